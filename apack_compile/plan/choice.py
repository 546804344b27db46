"""What the time model decides: head groups, which plan of a byte budget is fast enough, how long a prompt must be for packing to pay."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from apack_compile.kernels.format import Bands
from apack_compile.models.weights import bytes_of
from apack_compile.plan.bits import largest_ratio
from apack_compile.plan.budget import bands_within, tail_slots_for
from apack_compile.plan.coarse_rule import LEAST_RATIO, LEAST_TOKENS
from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan, uniform_plan
from apack_compile.plan.rotation import BLOCK, KeyRotation
from apack_compile.plan.time_model import OF_TYPE, Device, Load, predicted_speedup, share_of_bytes

# Component k of W has variance (1 + 24 k / W) ** -2.2: the mean over layers of SmolLM2-135M's keys and values (text, calibration
# pictures of the demo) within a third at every k.
DECAY_PER_WIDTH, DECAY_POWER = 24, 2.2
# How fast is fast enough, by what a user prefers: where work is done in turn, over a dense cache; where it overlaps, as a share of the
# plan's own byte limit, or of the fastest plan.
LEAST_SPEED = {"quality": 0.5, "balanced": 0.9, "speed": math.inf}
LEAST_SHARE = {"quality": 0.5, "balanced": 0.8, "speed": math.inf}
# Objective of the plan at ratio 8, over that of one basis and blocks of 32, SmolLM2-135M on text (benchmarks/harm.py): of one basis for
# all heads by slots of an anchor, and of a basis for each of the three heads over one for all.
HARM_OF_BLOCKS = {32: 1.0, 64: 1.05, 128: 1.11, 256: 1.17, 0: 1.31}
HARM_OF_A_BASIS_PER_HEAD = 2.3
# Bases that all requests share may weigh this share of a model's weights, or this many bytes where the model is smaller than any in use.
BASIS_SHARE, LEAST_LIMIT = 0.03, 2**20
# Calibrated plans keep up to 1.15 times the components of typical ones in all segments that are counted (SmolLM2 on text, the demo's VLM on
# pictures, ratios 2 to 16).
MOST_OF_TYPICAL = 1.15
HALF_BYTES, STEP_BYTES = 2, 4


def typical_variance(width: int) -> Tensor:
    """Variance `[width]` of a stream's components, of a head group this wide."""
    return (1 + DECAY_PER_WIDTH * torch.arange(width) / width) ** -DECAY_POWER


def predicted_harm(heads: int, groups: int, key_block: int) -> float:
    """What head groups and blocks of slots lose, over one basis and blocks of 32; between one basis and one a head by logarithm."""
    larger = [size for size in HARM_OF_BLOCKS if size >= key_block > 0]
    share = math.log(groups) / math.log(heads) if groups > 1 else 0.0
    of_blocks = HARM_OF_BLOCKS[min(larger) if larger else 256 if key_block else 0]
    return of_blocks * HARM_OF_A_BASIS_PER_HEAD**share


@cache
def typical_bands(width: int, ratio: float, aligned: bool, whole_tiles: bool) -> tuple[Bands, Bands]:
    """Bands of keys and values of typical variances; for a GPU keys count twice, so that streams differ as a model's do."""
    variance, scale_bits = typical_variance(width).double(), 16
    weights = [2 * variance, variance] if aligned else [variance]
    budget = len(weights) * (16 * width / ratio - scale_bits)
    bands = bands_within(weights, [1.0] * len(weights), budget, aligned, whole_tiles)
    return bands[0], bands[-1]


@cache
def typical_plan(
    heads: int,
    head_dim: int,
    tokens: int,
    ratio: float,
    groups: int,
    key_block: int,
    aligned: bool = False,
    whole_tiles: bool = False,
) -> Plan:
    """One layer's plan as a calibration of typical variances would give it, without bases; keys count as values.

    aligned, whole_tiles: as `budget_plan`.
    """
    bands = typical_bands(heads // groups * head_dim, ratio, aligned, whole_tiles)
    key, value = (StreamPlan("model", of_stream, token_scale=True) for of_stream in bands)
    plan = uniform_plan([0], LayerPlan(key, value, key, value), tail_slots_for(tokens, ratio))
    return replace(
        plan, groups=groups, rotation=KeyRotation(torch.zeros(head_dim // 2), key_block) if key_block else None
    )


@dataclass(frozen=True, order=True)
class PackedLayers:
    """Packed layers that are alike: their heads, how many they are, and whether a query sees the newest tokens alone."""

    query_heads: int
    heads: int
    head_dim: int
    count: int = 1
    has_window: bool = False

    @property
    def width(self) -> int:
        """Width of a stream over all KV heads."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Weights:
    """What shared bases are weighed against: the bytes of a model's weights.

    pictures: whether vision tokens have bases of their own; coarse: whether coarse tokens may have.
    """

    bytes: int
    pictures: bool = False
    coarse: bool = False

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> "Weights | None":
        """Those of a graph without pictures and coarse tokens; None for a graph that has no parameters, and so says nothing of a model."""
        found = bytes_of(parameters)
        return cls(found) if found else None

    @property
    def limit(self) -> int:
        """Bytes that the bases of all layers and segments may have."""
        return max(int(BASIS_SHARE * self.bytes), LEAST_LIMIT)

    @property
    def limit_is(self) -> str:
        """The limit in words."""
        if self.limit == LEAST_LIMIT:
            return f"{LEAST_LIMIT:,} bytes, which any model is granted"
        return f"{BASIS_SHARE:.0%} of the model's weights, {self.limit:,} bytes"

    def segments_of(self, layer: PackedLayers, ratio: float) -> int:
        """How many packed segments a plan can have there with bases of their own."""
        return 1 + self.pictures + (self.coarse and not layer.has_window and ratio >= LEAST_RATIO)


@dataclass(frozen=True)
class Groups:
    """How many head groups bases are fitted for, why, in which layers; and the slots that share an anchor, 0 for no anchors."""

    count: int
    reason: str
    layers: tuple[PackedLayers, ...]
    key_block: int = BLOCK


@dataclass(frozen=True)
class Option:
    """Head groups and slots of an anchor, and what is predicted: speed over a dense cache, share of the byte limit, harm."""

    groups: int
    key_block: int
    speed: float
    share: float
    harm: float


def choose(
    layers: Sequence[PackedLayers],
    element_bytes: int,
    ratio: float,
    key_block: int | None,
    device: Device,
    weights: Weights | None = None,
    prefer: str = "balanced",
    groups: int | None = None,
) -> Groups:
    """The head groups, and the slots of an anchor where none are given, that lose least among those predicted to be fast enough.

    In every layer, at the device's load. element_bytes: of the model's dtype. Groups that cannot reach the ratio are left out, and
    those too wide: for the device's kernels, or because the bases of all layers would weigh too much beside the model's weights.
    groups: those alone.
    """
    loads = [
        Load(*shape, device.planned_tokens, device.planned_batch, element_bytes=device.dense_bytes or element_bytes)
        for shape in dict.fromkeys((layer.query_heads, layer.heads, layer.head_dim) for layer in layers)
    ]
    reaching = counts_of(layers, ratio)
    narrow = [n for n in reaching if max(load.width for load in loads) // n <= (device.widest_basis or math.inf)]
    candidates, too_heavy = light_groups(narrow or reaching[-1:], layers, ratio, weights)
    blocks = device.key_blocks if key_block is None else (key_block,)
    options = [
        option(loads, ratio, count, block, device, prefer == "speed")
        for count in ([groups] if groups else candidates)
        for block in blocks
    ]
    found = (fastest_enough if device.overlaps else fewest_groups)(options, prefer)
    too_wide = "" if narrow == reaching else f"; no basis is wider than {device.widest_basis:,} there"
    where = f"ratio {ratio:g}, {device.planned_tokens:,} tokens, batch {device.planned_batch}, {device.name}"
    reason = f"predicted speed over a dense cache ({where}): {told(options, found)}{too_wide}{too_heavy}"
    return Groups(found.groups, reason, tuple(layers), found.key_block)


def option(
    loads: Sequence[Load], ratio: float, groups: int, key_block: int, device: Device, whole_tiles: bool = False
) -> Option:
    """What is predicted of head groups and slots of an anchor, in the layer where it is worst."""
    plans = [
        typical_plan(
            load.heads,
            load.head_dim,
            load.tokens,
            ratio,
            groups,
            key_block,
            device.aligned,
            whole_tiles and device.aligned,
        )
        for load in loads
    ]
    speed = min(predicted_speedup(plan, load, device) for plan, load in zip(plans, loads, strict=True))
    share = min(share_of_bytes(plan, load, device) for plan, load in zip(plans, loads, strict=True))
    return Option(groups, key_block, speed, share, max(predicted_harm(load.heads, groups, key_block) for load in loads))


def fewest_groups(options: Sequence[Option], prefer: str) -> Option:
    """The first option that is fast enough over a dense cache; the fastest where none is."""
    fast = (option for option in options if option.speed >= LEAST_SPEED[prefer])
    return next(fast, None) or max(options, key=lambda option: option.speed)


def fastest_enough(options: Sequence[Option], prefer: str) -> Option:
    """The option that loses least among those near enough to their byte limit, or to the fastest."""
    least, fastest = LEAST_SHARE[prefer], max(option.speed for option in options)
    fast = [one for one in options if one.share >= least or one.speed >= min(least, 1.0) * fastest]
    return min(fast, key=lambda option: (option.harm, -option.speed))


def told(options: Sequence[Option], found: Option) -> str:
    """Predicted speeds up to those of the chosen groups, and where there was more to choose, what the choice loses."""
    with_block = {option.groups: option for option in options if option.key_block == found.key_block}
    said = ", ".join(f"{one.speed:.2f} with {one.groups}" for one in with_block.values() if one.groups <= found.groups)
    if len({option.key_block for option in options}) == 1:
        return said
    least = min(options, key=lambda option: option.harm)
    return (
        f"{said}, keys rotated back by blocks of {found.key_block}; {found.share:.2f} of the byte limit. Predicted harm: "
        f"{found.harm / least.harm:.2f} times that of {least.groups} and blocks of {least.key_block}, at a speed of {least.speed:.2f}"
    )


def alike(layers: Iterable[PackedLayers]) -> tuple[PackedLayers, ...]:
    """Single layers, equal ones as one, in order."""
    return tuple(sorted(replace(one, count=count) for one, count in Counter(layers).items()))


def counts_of(layers: Sequence[PackedLayers], ratio: float) -> list[int]:
    """Numbers of head groups that divide the KV heads of every layer and can reach the ratio; one where none can."""
    counts = [n for n in range(1, min(one.heads for one in layers) + 1) if not any(one.heads % n for one in layers)]
    return [n for n in counts if min(largest_ratio(one.width // n) for one in layers) >= ratio] or counts[:1]


def light_groups(
    counts: Sequence[int], layers: Sequence[PackedLayers], ratio: float, weights: Weights | None
) -> tuple[list[int], str]:
    """Those numbers of head groups whose bases, in 16 bits, keep to the limit, or the largest; what a reader is told of the others."""
    if weights is None:
        return list(counts), ""
    most = {n: predicted_basis_bytes(layers, ratio, n, weights, HALF_BYTES, MOST_OF_TYPICAL) for n in counts}
    light = [n for n in counts if most[n] <= weights.limit]
    if len(light) == len(counts):
        return light, ""
    others = "fewer groups" if light else "any number of groups"
    return light or list(counts[-1:]), f"; with {others}, shared bases would weigh more than {weights.limit_is}"


def predicted_basis_bytes(
    layers: Sequence[PackedLayers],
    ratio: float,
    groups: int,
    weights: Weights,
    element_bytes: int,
    of_typical: float = 1.0,
) -> int:
    """Bytes of the bases of all layers and segments, where plans keep so many times the components of typical ones."""
    total = 0
    for layer in layers:
        width = layer.width // groups
        typical = typical_plan(layer.heads, layer.head_dim, LEAST_TOKENS, ratio, groups, 0).layers[0].text_key
        components = min(round(of_typical * typical.bands.components), width)
        one = groups * ((components + 1) * width * element_bytes + components * STEP_BYTES)
        total += 2 * one * layer.count * weights.segments_of(layer, ratio)
    return total


def head_groups_for(
    layers: Sequence[PackedLayers],
    dtype: torch.dtype,
    ratio: float,
    key_block: int | None,
    device_type: str,
    weights: Weights | None = None,
    prefer: str = "balanced",
) -> Groups:
    """Head groups for such layers on a type of device; where the time model does not know it, the fewest whose bases are light."""
    device = OF_TYPE.get(device_type)
    if device is not None:
        return choose(layers, dtype.itemsize, ratio, key_block, device, weights, prefer)
    light, left_out = light_groups(counts_of(layers, ratio), layers, ratio, weights)
    block = BLOCK if key_block is None else key_block
    return Groups(light[0], f"the time model has no figures for {device_type}{left_out}", tuple(layers), block)
