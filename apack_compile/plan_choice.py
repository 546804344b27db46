"""Which plan of a byte budget is fast enough, and how long a prompt must be for packing to pay, by the time model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from apack_compile.plan import Plan
from apack_compile.time_model import Device, Limits, Load, packed_limits, predicted_speedup

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
        return 0 if self.plan.turn is None else self.plan.turn.block


def option_of(plan: Plan, load: Load, device: Device) -> Option:
    """What a plan is predicted to do for a load."""
    limits = [packed_limits(plan, layer, load, device) for layer in plan.layers]
    summed = Limits(*(sum(getattr(one, name) for one in limits) for name in ("bytes", "matrix", "unpack", "turning")))
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
