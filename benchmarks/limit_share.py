"""What the time model says about a measured row."""

from dataclasses import replace
from functools import cache

import torch
from choices import DEVICES, measured_cpu
from harness import Row

from apack_compile.plan.plan import Plan
from apack_compile.plan.time_model import (
    Device,
    Load,
    dense_limits,
    packed_limits,
    predicted_speedup,
)


@cache
def running_device(device: str) -> Device | None:
    """What the time model knows of the running machine; None for a GPU that it does not."""
    if device == "cpu":
        return measured_cpu()
    name = torch.cuda.get_device_name()
    return next((known for known in DEVICES.values() if known.name in name), None)


def limit_columns(plan: Plan, load: Load, device: str, bandwidth: float, packed_seconds: float) -> Row:
    """Limits of the plan's first layer in milliseconds, their share of the measured time, and the predicted speed; {} for an unknown GPU.

    bandwidth: bytes per second of a copy in the same run.
    """
    known = running_device(device)
    if known is None:
        return {}
    known = replace(known, bytes_per_second=bandwidth)
    limits = packed_limits(plan, next(iter(plan.layers)), load, known)
    return {
        "limit": limits.tightest,
        "limit_of_bytes_ms": 1e3 * limits.bytes,
        "limit_of_matrix_ms": 1e3 * limits.matrix,
        "limit_of_unpack_ms": 1e3 * limits.unpack,
        "limit_of_rotating_ms": 1e3 * limits.rotating,
        "limit_of_dense_ms": 1e3 * dense_limits(load, known).seconds,
        "share_of_limit": limits.seconds / packed_seconds,
        "predicted_speedup": predicted_speedup(plan, load, known),
    }
