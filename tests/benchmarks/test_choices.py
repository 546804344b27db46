"""Which of several plans the time model takes, and the rates of the running CPU."""

from dataclasses import replace

import pytest
from choices import DEVICES, choose_groups, measured_cpu, shortest_length
from small_plans import plan_with

from apack_compile.kernels.format import Bands
from apack_compile.plan.plan import LayerPlan, Plan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.time_model import CPU, H200, Load, predicted_speedup

QWEN = Load(28, 4, 128, tokens=32_768, batch=16)


def erring(plan: Plan, error: float) -> Plan:
    """The plan with this expected error in every stream."""
    return replace(
        plan,
        layers={i: LayerPlan(*(replace(s, expected_error=error) for s in p.streams)) for i, p in plan.layers.items()},
    )


def test_the_choice_loses_least_among_the_fast_enough():
    bands = Bands((0, 0, 64, 224))
    relative, coarse, plain = (
        erring(plan_with(bands, bands, block=block, pairs=64), error)
        for block, error in ((32, 0.1), (256, 0.2), (0, 0.3))
    )
    plans = (plain, relative, coarse)
    speeds = [predicted_speedup(plan, QWEN, H200) for plan in (relative, coarse, plain)]
    assert speeds == sorted(speeds)
    for plan, speed in zip((relative, coarse, plain), speeds, strict=True):
        assert choose_groups(plans, QWEN, H200, speed).plan is plan
    unreachable = choose_groups(plans, QWEN, H200, 1e6)
    assert unreachable.plan is plain
    assert (unreachable.speedup, unreachable.error) == (speeds[2], pytest.approx(0.3))
    assert choose_groups(plans, QWEN, H200, 0.1).key_block == 32


def test_the_choice_refuses_nothing_to_choose_from_and_impossible_wishes():
    with pytest.raises(ValueError, match="plans"):
        choose_groups([], QWEN, H200, 2.0)
    with pytest.raises(ValueError, match="speedup=0"):
        choose_groups([lossless_plan([0])], QWEN, H200, 0)


def test_packing_pays_from_a_length_on():
    plan = plan_with(Bands((0, 0, 64, 224)), Bands((0, 0, 64, 224)))
    load = replace(QWEN, batch=1)
    shortest = shortest_length(lambda tokens: plan, load, H200)
    assert predicted_speedup(plan, replace(load, tokens=shortest), H200) >= 1
    assert predicted_speedup(plan, replace(load, tokens=shortest // 2), H200) < 1
    later = shortest_length(lambda tokens: lossless_plan([0]) if tokens == 4 * shortest else plan, load, H200)
    assert later == 8 * shortest
    assert shortest_length(lambda tokens: lossless_plan([0]), load, H200) is None


def test_the_running_cpu_can_be_measured():
    device = measured_cpu(0.01)
    assert device.name == CPU.name and DEVICES["CPU"] is CPU
    assert min(device.bytes_per_second, device.matrix_operations, device.unpack_operations) > 1e6
