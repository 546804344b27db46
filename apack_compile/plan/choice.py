"""What the time model decides: head groups, which plan of a byte budget is fast enough, how long a prompt must be for packing to pay."""

import math
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from apack_compile.plan.bits import bands_of, largest_ratio, runs_of, water_fill
from apack_compile.plan.budget import tail_slots_for
from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan, uniform_plan
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.time_model import OF_TYPE, Device, Load, basis_bytes, predicted_speedup

# Component k of W has variance (1 + 24 k / W) ** -2.2: the mean over layers of SmolLM2-135M's keys and values (text, calibration
# pictures of the demo) within a third at every k.
DECAY_PER_WIDTH, DECAY_POWER = 24, 2.2
# Head groups are split until a plan is predicted to reach this speed over a dense cache.
LEAST_SPEED = 0.9


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


# Query heads, KV heads and head_dim of packed layers.
Shapes = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Groups:
    """How many head groups bases are fitted for, why, and in layers of which shapes."""

    count: int
    reason: str
    shapes: Shapes


def fewest_groups(shapes: Shapes, element_bytes: int, ratio: float, key_block: int, device: Device) -> Groups:
    """The fewest head groups predicted to decode about as fast as a dense cache in every layer; the fastest where none do.

    At the device's load. element_bytes: of the model's dtype. Groups that cannot reach the ratio are left out, and those too wide: for
    the device's kernels, or because a layer's bases would outweigh the dense cache of a short request.
    """
    loads = [
        Load(*shape, device.planned_tokens, device.planned_batch, element_bytes=device.dense_bytes or element_bytes)
        for shape in shapes
    ]
    counts = [n for n in range(1, min(load.heads for load in loads) + 1) if not any(load.heads % n for load in loads)]
    reaching = [n for n in counts if min(largest_ratio(load.width // n) for load in loads) >= ratio] or counts[:1]
    narrow = [n for n in reaching if max(load.width for load in loads) // n <= (device.widest_basis or math.inf)]
    candidates = narrow or reaching[-1:]
    plans = {
        n: [typical_plan(one.heads, one.head_dim, one.tokens, ratio, n, key_block) for one in loads] for n in candidates
    }
    light = [n for n in candidates if all(map(partial(bases_are_light, device), plans[n], loads))]
    speeds: dict[int, float] = {}
    for count in light or candidates[-1:]:
        speeds[count] = min(
            predicted_speedup(plan, load, device) for plan, load in zip(plans[count], loads, strict=True)
        )
        if speeds[count] >= LEAST_SPEED:
            break
    chosen = max(speeds) if speeds[max(speeds)] >= LEAST_SPEED else max(speeds, key=lambda count: speeds[count])
    said = ", ".join(f"{speed:.2f} with {count}" for count, speed in speeds.items())
    where = f"ratio {ratio:g}, {device.planned_tokens:,} tokens, batch {device.planned_batch}, {device.name}"
    left_out = "" if narrow == reaching else f"; no basis is wider than {device.widest_basis:,} there"
    left_out += (
        "" if light == candidates else f"; with fewer, bases outweigh a dense cache of {device.short_tokens} tokens"
    )
    return Groups(chosen, f"predicted speed over a dense cache ({where}): {said}{left_out}", shapes)


def bases_are_light(device: Device, plan: Plan, load: Load) -> bool:
    """Whether a layer's bases have no more bytes than the dense cache of a short request, where the device asks for it."""
    keys_and_values = 2 * device.short_tokens * load.width * load.element_bytes
    bases = sum(basis_bytes(stream, load, plan.groups) for stream in plan.layers[0].pair("text"))
    return bases <= keys_and_values or not device.short_tokens


def head_groups_for(shapes: Shapes, dtype: torch.dtype, ratio: float, key_block: int, device_type: str) -> Groups:
    """Head groups for layers of these shapes on a type of device; one where the time model does not know it."""
    device = OF_TYPE.get(device_type)
    if device is None:
        return Groups(1, f"the time model has no figures for {device_type}", shapes)
    return fewest_groups(shapes, dtype.itemsize, ratio, key_block, device)
