"""The plan of a byte budget: what stays dense, and the bits that are left to every component."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apack_compile.kernels.format import Bands
from apack_compile.plan.basis import Spectrum
from apack_compile.plan.bits import bands_of, expected_error, fill_aligned, runs_of, water_fill
from apack_compile.plan.coarse_rule import NEWEST, CoarseRule
from apack_compile.plan.plan import BASIS_DTYPES, FIRST_TOKENS, STREAMS, LayerPlan, Plan, StreamPlan
from apack_compile.plan.ring import block_for, ring_slots
from apack_compile.plan.rotation import KeyRotation

# Bytes of a token's codes, in the mean of a plan's streams, from which they are aligned.
LEAST_ALIGNED = 32
# The tail of newest tokens may take this share of the budget, in tokens of these sizes.
TAIL_SHARE = 0.06
TAIL_SIZES = (32, 16, 8)


def tail_slots_for(tokens: int, ratio: float) -> int:
    """Newest tokens to keep dense: a small share of the budget, less for short prompts and high ratios."""
    affordable = TAIL_SHARE * tokens / ratio
    return next((size for size in TAIL_SIZES if size <= affordable), 0)


def spare_slots(tokens: int) -> int:
    """Free text slots that a cache of `tokens` tokens keeps for tokens to come."""
    return max(16, tokens // 32)


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
    rotation: KeyRotation | None = None,
    rules: Mapping[str, CoarseRule] | None = None,
    window: int | None = None,
    basis_limit: int | None = None,
    aligned: bool = False,
    whole_tiles: bool = False,
) -> Plan:
    """The plan that holds prompts of about `tokens` tokens, `vision_share` of them vision, at `ratio`.

    `statistics[layer][segment]` are the key's and the value's, of keys rotated back by `rotation`. The modality that most tokens are of is
    told apart where it has one of the `rules`. The budget is what a 16-bit dense cache takes, divided by the ratio, less what
    stays dense: the first tokens, the tail, and positions and rotations, shared or by layer. window: newest tokens that a query sees;
    a prompt that fills it is held in a ring of text slots, without its first tokens. basis_limit: bytes that its bases may have; those that
    would have more are stored in 16 bits. aligned, whole_tiles: for a GPU, as `bands_within`.
    """
    fills = window is not None and tokens >= window
    tokens = min(tokens, window or tokens)
    tail_slots, first_tokens = tail_slots_for(tokens, ratio), 0 if fills else FIRST_TOKENS
    packed_tokens = max(tokens - first_tokens - tail_slots, 1) + spare_slots(tokens) // 2
    placed_tokens = tokens
    if fills:
        packed_tokens = ring_slots(window, tail_slots, block_for(window) if rotation is None else rotation.block)
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
    place_bits = 32 + (0 if rotation is None else 64 * len(rotation.frequencies) / rotation.block)
    if coarse is not None:
        place_bits *= len(statistics)
    if rotation is not None and rotation.coordinates is not None:
        place_bits += 32 * rotation.coordinate_count
    fixed = (first_tokens + tail_slots) * dense_bits + place_bits * placed_tokens
    scale_bits = 16 * sum(len(layer["text"]) * groups_of(layer["text"][0]) for layer in statistics.values())
    budget = (tokens * dense_bits / ratio - fixed) / packed_tokens - scale_bits
    if tokens * dense_bits / ratio <= fixed:
        budget = (dense_bits / ratio) - scale_bits
    streams, cost = {}, {}
    for layer, segments in statistics.items():
        for source, part in share.items():
            for stream, measured in enumerate(segments[source]):
                weights = measured.weights.sum(0).double().cpu()
                streams[layer, source, stream] = weights * max(part, 1e-3)
                cost[layer, source, stream] = groups_of(measured) * max(part, 1e-3)
    chosen = dict(
        zip(streams, bands_within(streams.values(), cost.values(), budget, aligned, whole_tiles), strict=True)
    )
    dtype = basis_dtype(statistics, chosen, basis_limit)
    layers, bases = {}, {}
    for layer, segments in statistics.items():
        made = {}
        for source in share:
            for i, measured in enumerate(segments[source]):
                bands, spectrum = chosen[layer, source, i], measured.spectrum
                planned = StreamPlan("model", bands, True, expected_error(spectrum, bands))
                made[source, i] = planned, spectrum.basis(bands, dtype)
        # a segment whose statistics are another's has its bases too
        both = {
            f"{segment}_{name}": made[source, i]
            for segment, source in sources.items()
            for i, name in enumerate(STREAMS)
        }
        layers[layer] = LayerPlan(**{name: planned for name, (planned, _) in both.items()})
        bases[layer] = tuple(both[name][1] for name in layers[layer].named)
    groups = groups_of(next(iter(statistics.values()))["text"][0])
    return Plan(
        layers,
        tail_slots,
        groups=groups,
        bases=bases,
        separates_vision=separates_vision,
        rotation=rotation,
        coarse=coarse,
    )


def worth_storing(weights: Tensor) -> Tensor:
    """These weights, 0 where rounding to 16 bits costs as much anyway."""
    return torch.where(weights <= torch.finfo(torch.float32).eps * weights.sum(), 0.0, weights)


def bands_within(
    streams: Iterable[Tensor],
    cost: Iterable[float],
    budget: float,
    aligned: bool = False,
    whole_tiles: bool = False,
) -> list[Bands]:
    """Bands of each stream, of which components have these weights `[r]`; `cost`: what one bit of its token counts in the budget.

    aligned, whole_tiles: for a GPU (`fill_aligned`).
    """
    streams, costs = list(streams), torch.tensor(list(cost), dtype=torch.float64)
    if aligned and budget >= 8 * LEAST_ALIGNED * float(costs.sum()):
        return fill_aligned(list(map(worth_storing, streams)), costs, budget, whole_tiles)
    weights, lengths = zip(*map(runs_of, streams), strict=True)
    runs = [each * torch.tensor(length, dtype=torch.float64) for each, length in zip(costs, lengths, strict=True)]
    of_runs = torch.cat(list(map(worth_storing, weights)))
    bits = water_fill(of_runs, torch.cat(runs), budget).split([len(run) for run in lengths])
    return [bands_of(b.tolist(), run) for b, run in zip(bits, lengths, strict=True)]


def basis_dtype(
    statistics: Mapping[int, Mapping[str, tuple[StreamStatistics, StreamStatistics]]],
    chosen: Mapping[tuple[int, str, int], Bands],
    limit: int | None,
) -> torch.dtype:
    """What bases of these bands are stored in: the widest type with which they keep to the limit, else the narrowest."""
    elements = steps = 0
    for (layer, source, stream), bands in chosen.items():
        measured = statistics[layer][source][stream]
        elements += width_of(measured) * (bands.components + 1)
        steps += groups_of(measured) * bands.components
    fitting = (kind for kind in BASIS_DTYPES if limit is None or kind.itemsize * elements + 4 * steps <= limit)
    return next(fitting, BASIS_DTYPES[-1])


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
