"""What a preset is: a frozen dataclass of its options that makes plans, and scores tokens where it drops some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan, uniform_plan
from apack_compile.plan.tiers import TierRule

StreamRanks = int | Sequence[int]


@dataclass(frozen=True)
class Layers:
    """The layers that a plan of a preset is for, and what the configuration says of them.

    window: newest tokens that their queries see; None for all. can_be_packed: all layers of the model that can be. ranks, tail_slots:
    of the configuration.
    """

    layers: Sequence[int]
    window: int | None
    can_be_packed: Sequence[int]
    ranks: Mapping[str, StreamRanks]
    tail_slots: int


@dataclass(frozen=True)
class Preset(TierRule):
    """Options of a preset, checked; a subclass adds them as fields, and is listed in plan/presets."""

    name: ClassVar[str]

    def plan(self, wanted: Layers) -> Plan:
        """The plan of some layers; its tiers are for those without a window alone."""
        raise NotImplementedError

    def numbers_held(self, wanted: Layers, width: int, tokens: int) -> float:
        """16-bit numbers that so many text tokens of a window take in a layer, keys of all heads so wide; 0 for fewer than dense."""
        return 0.0


def half_plan(layers: Sequence[int], rule: Preset) -> Plan:
    """Untransformed tokens in 16 bits, all packed, of which a rule keeps and reads some."""
    plan = uniform_plan(layers, LayerPlan(*[StreamPlan("half")] * 4), tail_slots=0)
    return replace(plan, first_tokens=0, tiers=rule)


def check_share(owner: str, name: str, share: object) -> None:
    """Raise ValueError unless an option is a number from 0 to 1."""
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
        raise ValueError(f"{owner}: {name}={share!r} must be a number from 0 to 1")


def check_count(owner: str, name: str, count: object) -> None:
    """Raise ValueError unless an option is an integer from 1 up."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{owner}: {name}={count!r} must be an integer >= 1")
