"""Plans of one layer, for tests."""

from dataclasses import replace

import torch

from apack_compile.kernels.format import Bands
from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan, uniform_plan
from apack_compile.plan.rotation import KeyRotation


def plan_with(key: Bands, value: Bands, groups: int = 1, block: int = 0, pairs: int = 4, scope: str = "model") -> Plan:
    """Text streams of these bands, nothing dense but what is not counted here."""
    streams = [StreamPlan(scope, bands, scope == "model") for bands in (key, value)]
    rotation = KeyRotation(torch.zeros(pairs), block) if block else None
    return replace(
        uniform_plan([0], LayerPlan(*streams, *streams), tail_slots=0), first_tokens=0, groups=groups, rotation=rotation
    )
