"""Options of the published presets."""

from dataclasses import dataclass

# Newest tokens that stay dense at least where bases are fitted to each cache.
MIN_TAIL_SLOTS = 32


@dataclass(frozen=True)
class AttentionPackOptions:
    """Options of preset "attentionpack"; the defaults are the paper's (arXiv 2603.23914).

    full: share of vision tokens whose values are read at full rank; the others at the leading `partial` share of it. ema: weight
    of the old importance. refresh_every: decode steps between two choices. evict: share of vision tokens dropped after
    prefill. bits: 16, or 4 for quantized coefficients. basis: "sequence" as published, or "batch" for one that all
    rows share. Raises ValueError naming the argument.
    """

    full: float = 0.25
    partial: float = 0.25
    ema: float = 0.25
    refresh_every: int = 1
    evict: float = 0.0
    bits: int = 16
    basis: str = "sequence"

    def __post_init__(self) -> None:
        for name in ("full", "partial", "ema", "evict"):
            _check_share("attentionpack", name, getattr(self, name))
        if self.partial == 0 or self.evict == 1:
            raise ValueError(f"attentionpack: partial={self.partial!r} must be > 0 and evict={self.evict!r} < 1")
        _check_steps("attentionpack", "refresh_every", self.refresh_every)
        if self.bits not in (4, 16):
            raise ValueError(f"attentionpack: bits={self.bits!r} must be 4 or 16")
        if self.basis not in ("sequence", "batch"):
            raise ValueError(f"attentionpack: basis={self.basis!r} must be 'sequence' or 'batch'")


@dataclass(frozen=True)
class AVLOptions:
    """Options of preset "a-vl"; the defaults are those of its code (arXiv 2409.14846), text_kept is ours.

    core: share of vision tokens attended at every step. secondary: share stored, core included. core_every: steps after which
    all stored ones are attended and core is chosen anew. text_kept: share of text tokens kept: the first `text_first`, then
    `text_heavy` of the rest by accumulated attention, then the newest; pruned every `text_every` steps. Raises ValueError
    naming the argument.
    """

    core: float = 0.3
    secondary: float = 0.5
    core_every: int = 3
    text_kept: float = 0.5
    text_first: int = 20
    text_heavy: float = 0.7
    text_every: int = 8

    def __post_init__(self) -> None:
        for name in ("core", "secondary", "text_kept", "text_heavy"):
            _check_share("a_vl", name, getattr(self, name))
        if not 0 < self.core <= self.secondary:
            raise ValueError(f"a_vl: core={self.core!r} must be > 0 and at most secondary={self.secondary!r}")
        if not isinstance(self.text_first, int) or self.text_first < 1:
            raise ValueError(f"a_vl: text_first={self.text_first!r} must be an integer >= 1")
        for name in ("core_every", "text_every"):
            _check_steps("a_vl", name, getattr(self, name))


def _check_share(owner: str, name: str, share: object) -> None:
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
        raise ValueError(f"{owner}: {name}={share!r} must be a number from 0 to 1")


def _check_steps(owner: str, name: str, steps: object) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{owner}: {name}={steps!r} must be an integer >= 1")
