"""The time model against limits computed by hand, and what must hold of its predictions for any shape."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_plans import plan_with

from apack_compile.kernels.format import Bands
from apack_compile.plan import time_model
from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan
from apack_compile.plan.presets.a_vl import AVLOptions
from apack_compile.plan.presets.attentionpack import AttentionPackOptions, attentionpack_plan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.time_model import (
    CPU,
    H200,
    Device,
    Load,
    dense_limits,
    packed_limits,
    packed_seconds,
    predicted_speedup,
)

# One of everything a second, and products in tiles of 16 or 32 rows at full rate: limits are plain counts.
UNIT = Device("unit", 1.0, 1.0, 1.0, (16, 32))
QWEN = Load(28, 4, 128, tokens=32_768, batch=16)


def test_dense_reads_every_key_and_value_and_pads_the_rows_of_a_kv_head():
    limits = dense_limits(Load(12, 4, 8, tokens=100, batch=2), UNIT)
    assert limits.bytes == 2 * 100 * 2 * 4 * 8 * 2
    # 3 query heads share a KV head; 16 rows are multiplied
    assert limits.matrix == 2 * (2 * 16 * 8 * 4 * 100 * 2)
    assert (limits.unpack, limits.rotating) == (0, 0)


def test_packed_reads_codes_scales_positions_and_bases():
    # 2 groups of width 16; keys 4 + 2 bytes and a scale of 2, values 8 bytes and a scale
    plan = plan_with(Bands((0, 0, 8, 8)), Bands((4, 0, 0, 0)), groups=2)
    limits = packed_limits(plan, 0, Load(12, 4, 8, tokens=100, batch=3), UNIT)
    tokens = 2 * (4 + 2 + 2) + 2 * (8 + 2) + 4
    bases = 2 * (16 * 17 + 16) * 4 + 2 * (16 * 5 + 4) * 4
    assert limits.bytes == 300 * tokens + bases


def test_a_basis_of_its_own_is_read_once_a_sequence_in_16_bits():
    plan = plan_with(Bands((4, 0, 0, 0)), Bands((4, 0, 0, 0)), scope="sequence")
    limits = packed_limits(plan, 0, Load(4, 4, 8, tokens=10, batch=3), UNIT)
    assert limits.bytes == 30 * (2 * 8 + 4) + 3 * 2 * (32 * 5 + 4) * 2


def test_matrix_work_is_two_operations_a_component_and_padded_row():
    plan = plan_with(Bands((0, 0, 16, 0)), Bands((0, 0, 0, 32)))
    load = Load(20, 4, 8, tokens=1000, batch=2)
    # all 20 heads share the latents: a tile of 32; the bases' products have 5 rows a KV head and sequence, 10 in all: a tile of 16
    assert packed_limits(plan, 0, load, UNIT).matrix == 2 * 32 * (16 + 32) * 2000 + 2 * 16 * 8 * 4 * (16 + 32)


def test_unpacking_takes_no_operation_for_16_bits_one_for_8_and_two_below():
    plan = plan_with(Bands((16, 16, 16, 16)), Bands((16, 0, 0, 0)), groups=2)
    assert packed_limits(plan, 0, Load(4, 4, 8, tokens=10), UNIT).unpack == 10 * 2 * (16 + 32 + 32)


def test_codes_are_unpacked_for_every_tile_of_rows():
    plan = plan_with(Bands((0, 16, 0, 0)), Bands((0, 16, 0, 0)))
    one, three = (packed_limits(plan, 0, Load(heads, 4, 8, tokens=10), UNIT).unpack for heads in (32, 68))
    assert (one, three) == (320, 960)


def test_narrow_products_run_below_the_full_rate():
    device = Device("narrow", 1.0, 1.0, 1.0, (16, 32, 64), narrow_rows=64)
    assert device.matrix_seconds(64, 10) == 2 * 64 * 10
    assert device.matrix_seconds(16, 10) == pytest.approx(2 * 16 * 10 / 0.4)
    assert device.matrix_seconds(65, 10) == 2 * 128 * 10


def test_rotated_queries_are_products_before_the_pass_and_latents_written_and_read():
    bands, load = (Bands((0, 0, 16, 0)), Bands((0, 0, 16, 0))), Load(12, 4, 8, tokens=128, batch=2)
    plain, rotated = (packed_limits(plan_with(*bands, block=block), 0, load, UNIT) for block in (0, 32))
    blocks, latents = 8, 2 * 8 * 12 * 16
    assert rotated.rotating == max(2 * 12 * 8 * 16 * blocks, latents)
    assert rotated.bytes - plain.bytes == latents + blocks * 2 * 4 * 4
    assert rotated.matrix == plain.matrix


def test_dense_tokens_of_a_plan_are_read_dense():
    plan = replace(plan_with(Bands((0, 0, 16, 0)), Bands((0, 0, 16, 0))), first_tokens=4, tail_slots=16)
    load = Load(4, 4, 8, tokens=20, batch=2)
    assert packed_limits(plan, 0, load, UNIT) == dense_limits(load, UNIT)


def test_a_lossless_plan_takes_the_bytes_of_dense_and_the_positions():
    load = Load(12, 4, 8, tokens=100, batch=2)
    limits, dense = packed_limits(lossless_plan([0]), 0, load, UNIT), dense_limits(load, UNIT)
    assert limits.bytes - dense.bytes == 96 * 2 * 4
    assert limits.matrix == dense.matrix


def test_tiers_read_fewer_tokens_and_leading_components():
    ranks = dict.fromkeys(("vision_key", "vision_value", "text_key", "text_value"), 16)
    load = Load(4, 4, 8, tokens=68, vision_share=1.0)
    plans = [
        replace(attentionpack_plan([0], ranks, 64, options), first_tokens=4, tail_slots=0)
        for options in (AttentionPackOptions(full=1, partial=1), AttentionPackOptions(full=0.25, partial=0.25))
    ]
    whole, tiered = (packed_limits(plan, 0, load, UNIT) for plan in plans)
    assert whole.bytes - tiered.bytes == 48 * 12 * 2
    assert whole.matrix - tiered.matrix == 48 * 12 * 2 * 16


def test_vision_tokens_that_a_step_does_not_attend_are_not_read():
    load, kept = Load(4, 4, 8, tokens=100, vision_share=1.0), StreamPlan("half")
    plan = Plan({0: LayerPlan(kept, kept, kept, kept)}, tail_slots=0, first_tokens=0)
    whole, some = (
        packed_limits(replace(plan, tiers=tiers), 0, load, UNIT)
        for tiers in (None, AVLOptions(core=0.3, secondary=0.5))
    )
    assert some.bytes == pytest.approx(0.3 * whole.bytes)
    assert some.matrix == pytest.approx(0.3 * whole.matrix)


@given(
    st.sampled_from([H200, CPU]),
    st.integers(1, 40).map(lambda runs: 16 * runs),
    st.integers(1, 8).map(lambda n: 1024 * n),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 32),
)
def test_more_tokens_batch_components_or_bits_never_take_less_time(device, components, tokens, groups, batch):
    load = Load(28, 4, 128, tokens, batch)

    def seconds(counts=(0, 0, components // groups, 0), load=load, block=0):
        return packed_seconds(plan_with(Bands(counts), Bands(counts), groups, block), 0, load, device)

    least = seconds()
    # half a tile of a GPU's matrix unit costs as much as a whole one, and short codes fill it later
    whole = device is H200 and components // groups % 64 == 0
    assert seconds((components // groups, 0, 0, 0)) >= least or not whole
    assert seconds((0, 0, components // groups + 16, 0)) >= least
    assert seconds(load=replace(load, tokens=tokens + 512)) > least
    assert seconds(load=replace(load, batch=batch + 1)) > least
    assert seconds(block=256) >= least
    assert seconds(block=32) >= seconds(block=256)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 24).map(lambda runs: 16 * runs))
def test_a_limit_is_never_larger_than_the_time(groups, components):
    plan = plan_with(Bands((16, 0, components, components)), Bands((0, components, 0, components)), groups, block=64)
    limits = packed_limits(plan, 0, QWEN, H200)
    assert max(limits.bytes, limits.matrix, limits.unpack, limits.rotating) <= limits.seconds
    assert getattr(limits, limits.tightest) == max(limits.bytes, limits.matrix, limits.unpack, limits.rotating)
    assert packed_seconds(plan, 0, QWEN, H200) > limits.seconds


def test_fewer_bits_are_faster_than_int4_and_rank_64_is_fastest():
    rank_64 = plan_with(Bands((64, 0, 0, 0)), Bands((64, 0, 0, 0)))
    eighth = plan_with(Bands((0, 0, 64, 224)), Bands((0, 0, 64, 320)))
    int4 = plan_with(Bands((0, 0, 512, 0)), Bands((0, 0, 512, 0)))
    speeds = [predicted_speedup(plan, QWEN, H200) for plan in (int4, eighth, rank_64)]
    assert 1 < speeds[0] < speeds[1] < speeds[2]


def test_many_heads_with_one_basis_pay_in_matrix_work_and_bases():
    wide, narrow = (
        plan_with(Bands((0, 0, 512 // groups, 1792 // groups)), Bands((0, 0, 512 // groups, 1792 // groups)), groups)
        for groups in (1, 8)
    )
    busy, alone = Load(32, 32, 128, tokens=4096, batch=32), Load(32, 32, 128, tokens=8192)
    joint, split = (packed_limits(plan, 0, busy, H200) for plan in (wide, narrow))
    # more rows than a tile has are unpacked for again, and products of wide bases repeat each other's work
    assert joint.tightest == "unpack"
    assert joint.unpack > split.unpack
    assert joint.matrix > split.matrix
    # one sequence has to read the bases for itself
    assert packed_limits(wide, 0, alone, H200).tightest == "bytes"
    assert predicted_speedup(narrow, alone, H200) > 1.5 * predicted_speedup(wide, alone, H200)


def test_the_pass_is_of_one_warp_where_the_kernel_is():
    launch = pytest.importorskip("apack_compile.kernels.attend.triton_launch", reason="Triton is for Linux only")
    assert time_model.ONE_WARP_SUMS == launch.ONE_WARP_SUMS
    few, many = Bands((0, 32, 96, 128)), Bands((0, 96, 256, 160))
    shared = launch.shared_bytes(torch.device("cpu"))
    for values, rows in (([few], 14), ([few], 28), ([many], 8), ([few, many], 8)):
        chosen = launch.choose_launch(values, values, rows, rows, 64, 2, False, shared, 64)
        one_warp = time_model.issue_of(values, H200.row_tile(rows)) is time_model.ONE_WARP
        # a tile of the model has at most 16 rows, one of the kernel more
        assert (chosen.warps == 1) == one_warp or rows > 16
