"""What the time model says of several plans: which is fast enough, from which length packing pays; and a CPU's rates, measured."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from apack_compile.plan.plan import Plan
from apack_compile.plan.time_model import CPU, H200, Device, Limits, Load, packed_limits, predicted_speedup

DEVICES = {device.name: device for device in (H200, CPU)}
# Lengths between which `shortest_length` looks.
SHORTEST, LONGEST = 64, 2**20


@dataclass(frozen=True)
class Option:
    """A plan with what it is predicted to do: speed against dense, limits summed over layers, share of the variance that coding loses."""

    plan: Plan
    speedup: float
    limits: Limits
    error: float

    @property
    def key_block(self) -> int:
        """Slots that share an anchor; 0 for keys stored as they come."""
        return 0 if self.plan.rotation is None else self.plan.rotation.block


def option_of(plan: Plan, load: Load, device: Device) -> Option:
    """What a plan is predicted to do for a load."""
    limits = [packed_limits(plan, layer, load, device) for layer in plan.layers]
    summed = Limits(*(sum(getattr(one, name) for one in limits) for name in ("bytes", "matrix", "unpack", "rotating")))
    return Option(plan, predicted_speedup(plan, load, device), summed, expected_error(plan, load.vision_share))


def expected_error(plan: Plan, vision_share: float) -> float:
    """Share of a stream's variance that coding loses, mean over streams and layers, weighted by the segment's tokens."""
    weights = [share / 2 for share in plan.shares(vision_share).values() for _ in range(2)]
    losses = [
        weight * stream.expected_error
        for layer in plan.layers.values()
        for weight, stream in zip(weights, layer.streams, strict=True)
    ]
    return sum(losses) / len(plan.layers)


def choose_groups(plans: Iterable[Plan], load: Load, device: Device, speedup: float) -> Option:
    """The plan that loses least among those predicted to reach `speedup` against dense; the fastest where none does.

    plans: of one byte budget, with other head groups and key blocks. Raises ValueError for no plan, and for a speedup that is not > 0.
    """
    if not speedup > 0:
        raise ValueError(f"speedup={speedup!r} must be > 0")
    options = [option_of(plan, load, device) for plan in plans]
    if not options:
        raise ValueError("plans: there is none to choose from")
    fast = [option for option in options if option.speedup >= speedup]
    if not fast:
        return max(options, key=lambda option: option.speedup)
    return min(fast, key=lambda option: (option.error, -option.speedup))


def shortest_length(plan_of: Callable[[int], Plan], load: Load, device: Device, speedup: float = 1.0) -> int | None:
    """Tokens, a power of two, from which every longer prompt is predicted to decode `speedup` times as fast as dense; None for no length.

    plan_of: the plan for a prompt of so many tokens.
    """
    found, tokens = None, LONGEST
    while tokens >= SHORTEST:
        if predicted_speedup(plan_of(tokens), replace(load, tokens=tokens), device) < speedup:
            break
        found, tokens = tokens, tokens // 2
    return found


def measured_cpu(seconds: float = 1.0) -> Device:
    """The running machine's CPU, with as many threads as torch has; takes about `seconds`."""
    source, target = torch.zeros(2**25), torch.empty(2**25)
    # wide, so that threads seldom wait for each other
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    codes, numbers = torch.ones(2**17, dtype=torch.uint8), torch.empty(2**17)
    query, (key, value) = torch.randn(1, 16, 1, 128), torch.randn(2, 1, 16, 8_192, 128)
    calls = {
        2 * source.nbytes: partial(target.copy_, source),
        2 * 1024**3: partial(torch.mm, left, right),
        # placed and masked, as codes of less than a byte are
        2 * codes.numel(): partial(numbers.copy_, codes),
        2 * key.nbytes: partial(torch.nn.functional.scaled_dot_product_attention, query, key, value),
    }
    rates = []
    for work, call in calls.items():
        call()
        best, end = float("inf"), time.perf_counter() + seconds / len(calls)
        while time.perf_counter() < end:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        rates.append(work / best)
    copied, multiplied, unpacked, read = rates
    return replace(
        CPU,
        bytes_per_second=copied,
        matrix_operations=multiplied,
        unpack_operations=unpacked,
        dense_bytes_per_second=read,
    )
