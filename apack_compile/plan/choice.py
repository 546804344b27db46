"""What the time model decides: head groups, which plan of a byte budget is fast enough, how long a prompt must be for packing to pay."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from apack_compile.models.weights import bytes_of
from apack_compile.plan.bits import bands_of, largest_ratio, runs_of, water_fill
from apack_compile.plan.budget import tail_slots_for
from apack_compile.plan.coarse_rule import LEAST_RATIO, LEAST_TOKENS
from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan, uniform_plan
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.time_model import OF_TYPE, Device, Load, predicted_speedup

# Component k of W has variance (1 + 24 k / W) ** -2.2: the mean over layers of SmolLM2-135M's keys and values (text, calibration
# pictures of the demo) within a third at every k.
DECAY_PER_WIDTH, DECAY_POWER = 24, 2.2
# Head groups are split until a plan is predicted to reach this speed over a dense cache.
LEAST_SPEED = 0.9
# Bases that all requests share may weigh this share of a model's weights, or this many bytes where the model is smaller than any in use.
BASIS_SHARE, LEAST_LIMIT = 0.03, 2**20
# Calibrated plans keep up to 1.15 times the components of typical ones in all segments that are counted (SmolLM2 on text, the demo's VLM on
# pictures, ratios 2 to 16).
MOST_OF_TYPICAL = 1.15
HALF_BYTES, STEP_BYTES = 2, 4


def typical_variance(width: int) -> Tensor:
    """Variance `[width]` of a stream's components, of a head group this wide."""
    return (1 + DECAY_PER_WIDTH * torch.arange(width) / width) ** -DECAY_POWER


@cache
def typical_plan(heads: int, head_dim: int, tokens: int, ratio: float, groups: int, key_block: int) -> Plan:
    """One layer's plan as a calibration of typical variances would give it, without bases; keys count as values."""
    width = heads // groups * head_dim
    weights, lengths = runs_of(typical_variance(width)[None])
    scale_bits = 16
    bits = water_fill(weights, torch.tensor(lengths, dtype=torch.float64), 16 * width / ratio - scale_bits)
    stream = StreamPlan("model", bands_of(bits.tolist(), lengths), token_scale=True)
    plan = uniform_plan([0], LayerPlan(stream, stream, stream, stream), tail_slots_for(tokens, ratio))
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
    """How many head groups bases are fitted for, why, and in which layers."""

    count: int
    reason: str
    layers: tuple[PackedLayers, ...]


def fewest_groups(
    layers: Sequence[PackedLayers],
    element_bytes: int,
    ratio: float,
    key_block: int,
    device: Device,
    weights: Weights | None = None,
) -> Groups:
    """The fewest head groups predicted to decode about as fast as a dense cache in every layer; the fastest where none do.

    At the device's load. element_bytes: of the model's dtype. Groups that cannot reach the ratio are left out, and those too wide: for
    the device's kernels, or because the bases of all layers would weigh too much beside the model's weights.
    """
    loads = [
        Load(*shape, device.planned_tokens, device.planned_batch, element_bytes=device.dense_bytes or element_bytes)
        for shape in dict.fromkeys((layer.query_heads, layer.heads, layer.head_dim) for layer in layers)
    ]
    reaching = counts_of(layers, ratio)
    narrow = [n for n in reaching if max(load.width for load in loads) // n <= (device.widest_basis or math.inf)]
    candidates, too_heavy = light_groups(narrow or reaching[-1:], layers, ratio, weights)
    speeds: dict[int, float] = {}
    for count in candidates:
        plans = [typical_plan(one.heads, one.head_dim, one.tokens, ratio, count, key_block) for one in loads]
        speeds[count] = min(predicted_speedup(plan, load, device) for plan, load in zip(plans, loads, strict=True))
        if speeds[count] >= LEAST_SPEED:
            break
    chosen = max(speeds) if speeds[max(speeds)] >= LEAST_SPEED else max(speeds, key=lambda count: speeds[count])
    said = ", ".join(f"{speed:.2f} with {count}" for count, speed in speeds.items())
    where = f"ratio {ratio:g}, {device.planned_tokens:,} tokens, batch {device.planned_batch}, {device.name}"
    too_wide = "" if narrow == reaching else f"; no basis is wider than {device.widest_basis:,} there"
    reason = f"predicted speed over a dense cache ({where}): {said}{too_wide}{too_heavy}"
    return Groups(chosen, reason, tuple(layers))


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
    key_block: int,
    device_type: str,
    weights: Weights | None = None,
) -> Groups:
    """Head groups for such layers on a type of device; where the time model does not know it, the fewest whose bases are light."""
    device = OF_TYPE.get(device_type)
    if device is not None:
        return fewest_groups(layers, dtype.itemsize, ratio, key_block, device, weights)
    light, left_out = light_groups(counts_of(layers, ratio), layers, ratio, weights)
    return Groups(light[0], f"the time model has no figures for {device_type}{left_out}", tuple(layers))
