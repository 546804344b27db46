"""Preset "a-vl" (arXiv 2409.14846): vision tokens are core, secondary or evicted; text keeps its first, newest and heavy hitters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan
from apack_compile.plan.presets.base import Layers, Preset, check_count, check_share
from apack_compile.plan.tiers import TextEviction, TierPlan


@dataclass(frozen=True)
class AVLOptions(Preset):
    """Options of preset "a-vl"; the defaults are those of its code (arXiv 2409.14846), text_kept is ours.

    core: share of vision tokens attended at every step. secondary: share stored, core included. core_every: steps after which
    all stored ones are attended and core is chosen anew. text_kept: share of text tokens kept: the first `text_first`, then
    `text_heavy` of the rest by accumulated attention, then the newest; pruned every `text_every` steps. Raises ValueError
    naming the argument.
    """

    name: ClassVar[str] = "a-vl"
    core: float = 0.3
    secondary: float = 0.5
    core_every: int = 3
    text_kept: float = 0.5
    text_first: int = 20
    text_heavy: float = 0.7
    text_every: int = 8

    def __post_init__(self) -> None:
        for name in ("core", "secondary", "text_kept", "text_heavy"):
            check_share("a_vl", name, getattr(self, name))
        if not 0 < self.core <= self.secondary:
            raise ValueError(f"a_vl: core={self.core!r} must be > 0 and at most secondary={self.secondary!r}")
        for name in ("text_first", "core_every", "text_every"):
            check_count("a_vl", name, getattr(self, name))

    def plan(self, wanted: Layers) -> Plan:
        """The plan of some layers; those with a window have no tiers."""
        plan = a_vl_plan(wanted.layers, self)
        return plan if wanted.window is None else replace(plan, tiers=None)


def a_vl_plan(layers: Sequence[int], options: AVLOptions) -> Plan:
    """16-bit tokens; vision as core, secondary and evicted, text by first, newest and heavy hitters."""
    kept = StreamPlan("half")
    tiers = TierPlan(
        attended=options.core,
        kept=options.secondary,
        refresh_every=options.core_every,
        ema=(0.0, 1.0, 1.0, 1.0),
        text=TextEviction(options.text_kept, options.text_first, options.text_heavy, options.text_every),
    )
    return Plan(dict.fromkeys(layers, LayerPlan(kept, kept, kept, kept)), tail_slots=0, first_tokens=0, tiers=tiers)
