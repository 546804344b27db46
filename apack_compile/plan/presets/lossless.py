"""Preset "lossless": every token as the model made it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan, uniform_plan
from apack_compile.plan.presets.base import Layers, Preset


@dataclass(frozen=True)
class LosslessOptions(Preset):
    """Options of preset "lossless": none."""

    name: ClassVar[str] = "lossless"

    def plan(self, wanted: Layers) -> Plan:
        """The plan of some layers."""
        return lossless_plan(wanted.layers)


def lossless_plan(layers: Sequence[int]) -> Plan:
    """Every token untransformed, in the model's dtype."""
    kept = StreamPlan("as_is")
    return uniform_plan(layers, LayerPlan(kept, kept, kept, kept), tail_slots=0)
