"""Preset "attentionpack" (arXiv 2603.23914): truncated SVDs of each cache, and vision tokens read by their importance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from apack_compile.kernels.format import Bands
from apack_compile.plan.plan import MIN_TAIL_SLOTS, MODALITIES, STREAMS, LayerPlan, Plan, StreamPlan
from apack_compile.plan.presets.base import Layers, Preset, StreamRanks, check_count, check_share
from apack_compile.plan.ring import BLOCK_SHARE


@dataclass(frozen=True)
class AttentionPackOptions(Preset):
    """Options of preset "attentionpack"; the defaults are the paper's (arXiv 2603.23914).

    full: share of vision tokens whose values are read at full rank; the others at the leading `partial` share of it. ema: weight
    of the old importance. refresh_every: decode steps between two choices. evict: share of vision tokens dropped after
    prefill. bits: 16, or 4 for quantized coefficients. basis: "sequence" as published, or "batch" for one that all
    rows share. Raises ValueError naming the argument.
    """

    name: ClassVar[str] = "attentionpack"
    full: float = 0.25
    partial: float = 0.25
    ema: float = 0.25
    refresh_every: int = 1
    evict: float = 0.0
    bits: int = 16
    basis: str = "sequence"

    def __post_init__(self) -> None:
        for name in ("full", "partial", "ema", "evict"):
            check_share(self.name, name, getattr(self, name))
        if self.partial == 0 or self.evict == 1:
            raise ValueError(f"attentionpack: partial={self.partial!r} must be > 0 and evict={self.evict!r} < 1")
        check_count(self.name, "refresh_every", self.refresh_every)
        if self.bits not in (4, 16):
            raise ValueError(f"attentionpack: bits={self.bits!r} must be 4 or 16")
        if self.basis not in ("sequence", "batch"):
            raise ValueError(f"attentionpack: basis={self.basis!r} must be 'sequence' or 'batch'")

    @property
    def kept(self) -> float:
        """Share of vision tokens that are kept, those with the highest importance."""
        return 1 - self.evict

    @property
    def pools(self) -> tuple[tuple[str, ...], ...]:
        """Vision tokens alone are evicted."""
        return () if self.evict == 0 else (("vision",),)

    @property
    def decay(self) -> tuple[float, float, float, float]:
        """Importance is a moving average of attention."""
        return (self.ema, 1 - self.ema) * 2

    def plan(self, wanted: Layers) -> Plan:
        """Truncated SVD of some layers; in those with a window the tail is shorter."""
        layers, window = wanted.layers, wanted.window
        ranks = {name: ranks_of(given, wanted.can_be_packed, layers, name) for name, given in wanted.ranks.items()}
        return attentionpack_plan(layers, ranks, tail_for(wanted.tail_slots, window), self)

    def numbers_held(self, wanted: Layers, width: int, tokens: int) -> float:
        """16-bit numbers that so many text tokens take in a layer: a basis and a tail of its own may outweigh what a window saves."""
        held = 0.0
        for name in (f"text_{stream}" for stream in STREAMS):
            given = ranks_of(wanted.ranks[name], wanted.can_be_packed, wanted.layers, name)
            rank = min(given if isinstance(given, int) else given[0], width)
            packed = rank * (tokens * self.bits / 16 + width) + width
            held += tail_for(wanted.tail_slots, wanted.window) * width + min(packed, tokens * width)
        return held


COMPACTION_ONLY = AttentionPackOptions(full=1.0, partial=1.0)


def attentionpack_plan(
    layers: Sequence[int],
    ranks: Mapping[str, StreamRanks],
    tail_slots: int,
    options: AttentionPackOptions = COMPACTION_ONLY,
) -> Plan:
    """Truncated SVD per sequence (or batch), modality and stream; tiers of vision tokens by importance.

    ranks: of each stream, for all layers or one per packed layer; raises ValueError where they are not as many.
    """
    for name, given in ranks.items():
        if not isinstance(given, int) and len(given) != len(layers):
            raise ValueError(f"ranks: {name} has {len(given)} ranks, but {len(layers)} layers are packed")
    plans = {}
    for i, layer in enumerate(layers):
        streams = []
        for modality in MODALITIES:
            for stream in STREAMS:
                given = ranks[f"{modality}_{stream}"]
                rank = given if isinstance(given, int) else given[i]
                streams.append(StreamPlan(options.basis, Bands.of({options.bits: rank})))
        plans[layer] = LayerPlan(*streams)
    if options.evict == 0 and 1 in (options.full, options.partial):
        return Plan(plans, tail_slots)
    return Plan(plans, tail_slots, tiers=options)


def tail_for(tail_slots: int, window: int | None) -> int:
    """Newest tokens to keep dense: as asked, but of a window an eighth, or the fewest that fitted bases allow."""
    return tail_slots if window is None else max(min(tail_slots, int(window * BLOCK_SHARE)), MIN_TAIL_SLOTS)


def ranks_of(given: StreamRanks, can_be_packed: Sequence[int], layers: Sequence[int], name: str) -> StreamRanks:
    """Ranks of some layers, of one rank for all that can be packed or one for each; raises ValueError where they are not as many."""
    if isinstance(given, int):
        return given
    if len(given) != len(can_be_packed):
        raise ValueError(f"ranks: {name} has {len(given)} ranks, but {len(can_be_packed)} layers can be packed")
    return [given[can_be_packed.index(layer)] for layer in layers]
