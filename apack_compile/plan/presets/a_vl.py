"""Preset "a-vl" (arXiv 2409.14846): vision tokens are core, secondary or evicted; text keeps its first, newest and heavy hitters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apack_compile.plan.plan import Plan
from apack_compile.plan.presets.base import Layers, Preset, check_count, check_share, half_plan
from apack_compile.plan.tiers import Tokens, share_of


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

    @property
    def attended(self) -> float:
        """Share of vision tokens that are read at every step."""
        return self.core

    @property
    def kept(self) -> float:
        """Share of vision tokens that are kept, those with the highest attention."""
        return self.secondary

    @property
    def refresh_every(self) -> int:
        """Decode steps between two choices of the core."""
        return self.core_every

    @property
    def decay(self) -> tuple[float, float, float, float]:
        """Importance is the newest attention of vision tokens, and the sum of text's."""
        return (0.0, 1.0, 1.0, 1.0)

    @property
    def pools(self) -> tuple[tuple[str, ...], ...]:
        """Vision and text are evicted each by itself."""
        return (("vision",), ("text",))

    @property
    def prune_every(self) -> int:
        """Decode steps between two evictions of text."""
        return self.text_every

    def always(self, tokens: Tokens) -> Tensor | None:
        """Of text, the first tokens and the newest, which are what the heavy hitters leave of the budget."""
        if "text" not in tokens.modalities:
            return None
        budget = self.budget(tokens)
        first = budget.clamp_max(self.text_first)
        recent = budget - first - share_of(budget - first, self.text_heavy)
        return (tokens.place < first[:, None]) | (tokens.place >= (tokens.count - recent)[:, None])

    def budget(self, tokens: Tokens) -> Tensor:
        """How many tokens `[B]` are kept."""
        if "text" not in tokens.modalities:
            return share_of(tokens.seen, self.kept)
        wanted = share_of(tokens.seen, self.text_kept).clamp_min(self.text_first)
        return wanted.minimum(tokens.count)

    def plan(self, wanted: Layers) -> Plan:
        """16-bit tokens, of which some are evicted."""
        return half_plan(wanted.layers, self)
