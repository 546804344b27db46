"""Plans: how every stream is stored, and the bits each component gets for a byte budget."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from apack_compile.kernels.format import GAUSSIAN_DISTORTION, Bands, StreamBasis
from apack_compile.plan.basis import BAND_GRAIN, Spectrum
from apack_compile.plan.importance import NEWEST, CoarseRule
from apack_compile.plan.preset_options import AttentionPackOptions, AVLOptions
from apack_compile.plan.ranks import ALONE, Ranks
from apack_compile.plan.ring import block_for, ring_slots
from apack_compile.plan.rotation import KeyTurn
from apack_compile.plan.tiers import TextEviction, TierPlan

MODALITIES = ("vision", "text")
STREAMS = ("key", "value")
# Packed segments, in the operations' order.
SEGMENTS = ("coarse", *MODALITIES)
FIRST_TOKENS = 4
# Scopes whose bases are fitted to what a cache holds, and stored with it.
FITTED_SCOPES = ("sequence", "batch")
# The tail of newest tokens may take this share of the budget, in tokens of these sizes.
TAIL_SHARE = 0.06
TAIL_SIZES = (32, 16, 8)


@dataclass(frozen=True)
class StreamPlan:
    """How one stream of one modality is stored.

    scope: "as_is" (untransformed, model dtype), "half" (untransformed, 16 bits), "sequence" (a basis per sequence), "batch"
    (one for all rows of a batch) or "model" (one for all requests). expected_error: share of a stream's variance that
    coding loses on the calibration's tokens.
    """

    scope: str
    bands: Bands = field(default_factory=Bands)
    token_scale: bool = False
    expected_error: float = 0.0


@dataclass(frozen=True)
class LayerPlan:
    """The streams of a layer; coarse ones where a rule tells coarse tokens from fine ones."""

    vision_key: StreamPlan
    vision_value: StreamPlan
    text_key: StreamPlan
    text_value: StreamPlan
    coarse_key: StreamPlan | None = None
    coarse_value: StreamPlan | None = None

    @property
    def named(self) -> dict[str, StreamPlan]:
        """The streams by name, in the operations' order: coarse K and V if there are any, vision K, vision V, text K, text V."""
        names = [f"{segment}_{stream}" for segment in SEGMENTS for stream in STREAMS]
        return {name: stream for name in names if (stream := getattr(self, name)) is not None}

    @property
    def streams(self) -> tuple[StreamPlan, ...]:
        """The streams, in the operations' order."""
        return tuple(self.named.values())


@dataclass(frozen=True)
class Provenance:
    """Where a plan comes from: what its bases were calibrated on, the versions that made it, the file it was loaded from.

    plan_id: the same for the parts of one plan on all ranks of tensor parallelism, another for every other plan; None for one rank.
    """

    calibrated_on: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None
    plan_id: str | None = None


@dataclass(frozen=True)
class Plan:
    """A plan for one cache, with the model-scoped bases it needs.

    layers: plan of each packed layer, by its index in the model. tail_slots: newest tokens kept dense. first_tokens: tokens
    at the start kept dense. groups: head groups. bases: of the streams of each model-scoped layer, in their order.
    signature: layers, KV heads, head_dim and dtype of the model it is for. tiers: what a step reads; None for all. turn: how packed
    keys were turned back; None for keys stored as they come. coarse: which tokens the coarse segment holds; None for none.
    ranks: of tensor parallelism, which it was made on; the signature's KV heads are that rank's. window: newest tokens that a
    query of these layers sees, itself included; None for all, or where a file of an earlier format does not say. windows: plans of
    the layers with other windows, by window.
    """

    layers: Mapping[int, LayerPlan]
    tail_slots: int
    first_tokens: int = FIRST_TOKENS
    groups: int = 1
    bases: Mapping[int, tuple[StreamBasis, ...]] = field(default_factory=dict, repr=False)
    separates_vision: bool = True
    signature: tuple = ()
    provenance: Provenance = Provenance()
    tiers: TierPlan | None = None
    turn: KeyTurn | None = None
    coarse: CoarseRule | None = None
    ranks: Ranks = ALONE
    window: int | None = None
    windows: Mapping[int, "Plan"] = field(default_factory=dict)

    @property
    def by_window(self) -> dict[int | None, "Plan"]:
        """This plan and those of the layers with other windows."""
        return {self.window: self, **self.windows}

    @property
    def every_layer(self) -> list[int]:
        """The layers of all windows, in order."""
        return sorted(layer for part in self.by_window.values() for layer in part.layers)

    def of_layer(self, layer: int) -> "Plan":
        """The plan that has a layer."""
        return next(part for part in self.by_window.values() if layer in part.layers)

    @property
    def segments(self) -> tuple[str, ...]:
        """The packed segments, in the operations' order."""
        return SEGMENTS if self.coarse is not None else MODALITIES

    def shares(self, vision_share: float) -> dict[str, float]:
        """Share of a prompt's tokens that each packed segment holds, of so many vision tokens, in the segments' order."""
        vision = vision_share if self.separates_vision else 0.0
        held = {"vision": vision, "text": 1 - vision}
        if self.coarse is not None:
            coarse = held[self.coarse.modality] * self.coarse.share
            held[self.coarse.modality] -= coarse
            held["coarse"] = coarse
        return {segment: held[segment] for segment in self.segments}

    @property
    def has_coordinates(self) -> bool:
        """Whether packed keys turn by several coordinates of a token, which a cache must be shown."""
        return self.turn is not None and self.turn.coordinates is not None

    @property
    def layers_place_tokens(self) -> bool:
        """Whether each layer has positions of its own, because it orders, evicts or separates tokens by itself."""
        return self.tiers is not None or self.coarse is not None

    @property
    def per_request(self) -> bool:
        """Whether bases are fitted to the tokens of each cache."""
        return any(stream.scope in FITTED_SCOPES for layer in self.layers.values() for stream in layer.streams)

    def save(self, path: str | os.PathLike) -> None:
        """Write this plan to one file, whole or not at all; raises ValueError for a plan that no cache can use.

        Under tensor parallelism every rank saves its plan to the same file, which then holds those of all; parts of another plan in it
        go. Between two plans, wait until all ranks have saved the first.
        """
        from apack_compile.plan.file import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """The plan of a file; raises FileNotFoundError, and ValueError for a file that does not hold a whole, usable plan."""
        from apack_compile.plan.file import load_plan

        return load_plan(path)

    def to(self, device: torch.device) -> "Plan":
        """This plan with its bases on a device."""
        moved = {i: tuple(StreamBasis(*(t.to(device) for t in b)) for b in bases) for i, bases in self.bases.items()}
        turn = None if self.turn is None else self.turn.to(device)
        coarse = None if self.coarse is None else self.coarse.to(device)
        windows = {window: part.to(device) for window, part in self.windows.items()}
        return replace(self, bases=moved, turn=turn, coarse=coarse, windows=windows)


StreamRanks = int | Sequence[int]


def uniform_plan(layers: Sequence[int], streams: LayerPlan, tail_slots: int) -> Plan:
    """The same streams in every layer."""
    return Plan(dict.fromkeys(layers, streams), tail_slots)


def lossless_plan(layers: Sequence[int]) -> Plan:
    """Every token untransformed, in the model's dtype."""
    kept = StreamPlan("as_is")
    return uniform_plan(layers, LayerPlan(kept, kept, kept, kept), tail_slots=0)


COMPACTION_ONLY = AttentionPackOptions(full=1.0, partial=1.0)


def attentionpack_plan(
    layers: Sequence[int],
    ranks: Mapping[str, StreamRanks],
    tail_slots: int,
    options: AttentionPackOptions = COMPACTION_ONLY,
) -> Plan:
    """AttentionPack (arXiv 2603.23914): truncated SVD per sequence (or batch), modality and stream; tiers of vision tokens by importance.

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
                streams.append(
                    StreamPlan(options.basis, Bands((rank, 0, 0, 0) if options.bits == 16 else (0, 0, rank, 0)))
                )
        plans[layer] = LayerPlan(*streams)
    if options.evict == 0 and 1 in (options.full, options.partial):
        return Plan(plans, tail_slots)
    tiers = TierPlan(
        full=options.full,
        partial=options.partial,
        kept=1 - options.evict,
        refresh_every=options.refresh_every,
        ema=(options.ema, 1 - options.ema) * 2,
    )
    return Plan(plans, tail_slots, tiers=tiers)


def a_vl_plan(layers: Sequence[int], options: AVLOptions) -> Plan:
    """A-VL (arXiv 2409.14846): 16-bit tokens; vision as core, secondary and evicted, text by first, newest and heavy hitters."""
    kept = StreamPlan("half")
    tiers = TierPlan(
        attended=options.core,
        kept=options.secondary,
        refresh_every=options.core_every,
        ema=(0.0, 1.0, 1.0, 1.0),
        text=TextEviction(options.text_kept, options.text_first, options.text_heavy, options.text_every),
    )
    return Plan(dict.fromkeys(layers, LayerPlan(kept, kept, kept, kept)), tail_slots=0, first_tokens=0, tiers=tiers)


def tail_slots_for(tokens: int, ratio: float) -> int:
    """Newest tokens to keep dense: a small share of the budget, less for short prompts and high ratios."""
    affordable = TAIL_SHARE * tokens / ratio
    return next((size for size in TAIL_SIZES if size <= affordable), 0)


def water_fill(weights: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Bits per run of components `[n]` that minimise the weighted distortion within `budget`.

    Reverse water-filling over the widths that exist: a run takes the width with the smallest
    `weight * distortion(width) + slope * cost * width`, and the slope is bisected. `weights` is a run's distortion when
    dropped, `cost` what one bit in it counts, float64.
    """
    widths = torch.tensor(list(GAUSSIAN_DISTORTION), dtype=torch.float64)
    distortion = torch.tensor(list(GAUSSIAN_DISTORTION.values()), dtype=torch.float64)

    def choose(slope: float) -> Tensor:
        lagrangian = weights[:, None] * distortion + slope * cost[:, None] * widths
        return widths[lagrangian.argmin(1)]

    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        if float((choose(2.0**middle) * cost).sum()) > budget:
            low = middle
        else:
            high = middle
    return choose(2.0**high)


def runs_of(spectrum_weights: Tensor) -> tuple[Tensor, list[int]]:
    """Weights `[G, r]` of components summed over head groups and runs, and each run's length."""
    total = spectrum_weights.sum(0).double().cpu()
    runs = total.split(BAND_GRAIN)
    return torch.stack([run.sum() for run in runs]), [len(run) for run in runs]


def spare_slots(tokens: int) -> int:
    """Free text slots that a cache of `tokens` tokens keeps for tokens to come."""
    return max(16, tokens // 32)


def largest_ratio(width: int) -> float:
    """The ratio of a stream of this width with one 2-bit run and a scale per token: nothing smaller is worth storing."""
    return 16 * width / (2 * min(BAND_GRAIN, width) + 16)


def bands_of(bits: Sequence[float], lengths: Sequence[int]) -> Bands:
    """Bands of runs with falling bits; the first run has two bits at least."""
    counts = {16: 0, 8: 0, 4: 0, 2: 0}
    for run, (width, length) in enumerate(zip(bits, lengths, strict=True)):
        width = max(width, 2) if run == 0 else width
        if width:
            counts[int(width)] += length
    return Bands((counts[16], counts[8], counts[4], counts[2]))


@dataclass(frozen=True)
class StreamStatistics:
    """What the plan needs of a calibrated stream: its spectrum and, per component `[G, r]`, the harm a token that drops it does."""

    spectrum: Spectrum
    weights: Tensor


def budget_plan(
    statistics: Mapping[int, Mapping[str, tuple[StreamStatistics, StreamStatistics]]],
    ratio: float,
    tokens: int,
    vision_share: float,
    element_bytes: int = 2,
    turn: KeyTurn | None = None,
    rules: Mapping[str, CoarseRule] | None = None,
    window: int | None = None,
) -> Plan:
    """The plan that holds prompts of about `tokens` tokens, `vision_share` of them vision, at `ratio`.

    `statistics[layer][segment]` are the key's and the value's, of keys turned back by `turn`. The modality that most tokens are of is
    told apart where it has one of the `rules`. The budget is what a 16-bit dense cache takes, divided by the ratio, less what
    stays dense: the first tokens, the tail, and positions and turns, shared or by layer. window: newest tokens that a query sees;
    a prompt that fills it is held in a ring of text slots, without its first tokens.
    """
    fills = window is not None and tokens >= window
    tokens = min(tokens, window or tokens)
    tail_slots, first_tokens = tail_slots_for(tokens, ratio), 0 if fills else FIRST_TOKENS
    packed_tokens = max(tokens - first_tokens - tail_slots, 1) + spare_slots(tokens) // 2
    placed_tokens = tokens
    if fills:
        packed_tokens = ring_slots(window, tail_slots, block_for(window) if turn is None else turn.block)
        placed_tokens = packed_tokens
    separates_vision = all("vision" in layer for layer in statistics.values())
    share = {"vision": vision_share, "text": 1 - vision_share} if separates_vision else {"text": 1.0}
    coarse = (rules or {}).get(max(share, key=lambda modality: share[modality]))
    sources = {modality: modality for modality in share}
    if coarse is not None:
        grades = {"coarse": f"coarse_{coarse.modality}", coarse.modality: f"fine_{coarse.modality}"}
        whole = share.pop(coarse.modality)
        told = whole * coarse.share * max(tokens - NEWEST, 0) / packed_tokens
        share |= {grades["coarse"]: told, grades[coarse.modality]: whole - told}
        sources |= grades
    sources.setdefault("vision", sources["text"])
    dense_bits = sum(8 * element_bytes * width_of(s) for layer in statistics.values() for s in layer["text"])
    place_bits = 32 + (0 if turn is None else 64 * len(turn.frequencies) / turn.block)
    if coarse is not None:
        place_bits *= len(statistics)
    if turn is not None and turn.coordinates is not None:
        place_bits += 32 * turn.coordinate_count
    fixed = (first_tokens + tail_slots) * dense_bits + place_bits * placed_tokens
    scale_bits = 16 * sum(len(layer["text"]) * groups_of(layer["text"][0]) for layer in statistics.values())
    budget = (tokens * dense_bits / ratio - fixed) / packed_tokens - scale_bits
    if tokens * dense_bits / ratio <= fixed:
        budget = (dense_bits / ratio) - scale_bits
    weights, cost, owners, lengths = [], [], [], []
    for layer, segments in statistics.items():
        for source, part in share.items():
            for stream, measured in enumerate(segments[source]):
                run_weights, run_lengths = runs_of(measured.weights)
                groups = groups_of(measured)
                weights.append(run_weights * max(part, 1e-3))
                cost.append(torch.tensor(run_lengths, dtype=torch.float64) * groups * max(part, 1e-3))
                owners.append((layer, source, stream))
                lengths.append(run_lengths)
    bits = water_fill(torch.cat(weights), torch.cat(cost), budget).split([len(run) for run in lengths])
    chosen = {owner: bands_of(b.tolist(), run) for owner, b, run in zip(owners, bits, lengths, strict=True)}
    layers, bases = {}, {}
    for layer, segments in statistics.items():
        streams, layer_bases = {}, {}
        for segment, source in sources.items():
            for i, name in enumerate(f"{segment}_{stream}" for stream in STREAMS):
                bands, spectrum = chosen[layer, source, i], segments[source][i].spectrum
                streams[name] = StreamPlan("model", bands, True, expected_error(spectrum, bands))
                layer_bases[name] = spectrum.basis(bands)
        layers[layer] = LayerPlan(**streams)
        bases[layer] = tuple(layer_bases[name] for name in layers[layer].named)
    groups = groups_of(next(iter(statistics.values()))["text"][0])
    return Plan(
        layers, tail_slots, groups=groups, bases=bases, separates_vision=separates_vision, turn=turn, coarse=coarse
    )


def expected_error(spectrum: Spectrum, bands: Bands) -> float:
    """Share of a stream's variance that these bands lose, for Gaussian components."""
    variance = spectrum.deviation.double().square().sum((0, 1))
    lost = torch.tensor(
        [GAUSSIAN_DISTORTION[bits] for bits in bands.widths], dtype=torch.float64, device=variance.device
    )
    kept = variance[: len(lost)]
    return float((variance.sum() - kept.sum() + (kept * lost).sum()) / variance.sum())


def width_of(statistics: StreamStatistics) -> int:
    """Width of a stream over all head groups."""
    return statistics.spectrum.mean.shape[-1] * statistics.spectrum.mean.shape[-2]


def groups_of(statistics: StreamStatistics) -> int:
    """Head groups of a stream."""
    return statistics.spectrum.mean.shape[-2]


def budget_key(tokens: int, vision_share: float) -> tuple[int, float]:
    """The representative prompt that shares a plan with this one: lengths in steps of sqrt(2), shares in eighths."""
    steps = max(round(2 * math.log2(max(tokens, 64))), 12)
    return round(2 ** (steps / 2)), round(vision_share * 8) / 8
