"""Rows of the attention benchmark: states that the operation takes, bytes that the time model agrees with."""

import attend
import pytest
import torch
from limit_share import limit_columns

from apack_compile.kernels.attend.reference import attend as reference
from apack_compile.kernels.native import INSTRUCTION_SETS, SETS
from apack_compile.plan.time_model import Device, Load, packed_limits

SHAPE = attend.SHAPES["SmolLM2-135M"]
# A byte a second, and nothing else costs anything.
BYTES = Device("bytes", 1.0, 1e30, 1e30)


def sum_bytes(tensors):
    """Bytes of some tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(
    ("ratio", "groups", "key_block", "tokens"),
    [(8.0, 1, 0, 1_100), (8.0, 3, 32, 1_024), (8.0, 1, 64, 512), (4.0, 1, 64, 1_024), (None, 1, 0, 1_024)],
)
def test_the_operation_takes_the_states_that_are_timed(ratio, groups, key_block, tokens):
    torch.manual_seed(0)
    plan = attend.synthetic_plan(SHAPE, groups, ratio, tokens, coarse=True)
    assert (plan.coarse is not None) == (ratio == 8.0 and tokens >= 1_024)
    plan = attend.with_relative_keys(plan, SHAPE, key_block)
    packed = attend.packed_state(plan, SHAPE, groups, tokens, 2, torch.float32, "cpu")
    query = torch.randn(2, SHAPE.query_heads, 1, SHAPE.head_dim)
    new = torch.randn(2, 2, SHAPE.heads, 1, SHAPE.head_dim)
    out = reference(query, *new, None, *packed.state.flatten(), None)
    assert out.shape == query.shape and out.isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "groups", "coarse"), [(8.0, 1, False), (8.0, 1, True), (4.0, 3, False), (None, 1, False)]
)
def test_the_time_model_counts_the_bytes_that_a_step_reads(ratio, groups, coarse):
    tokens, batch = 4_096, 2
    plan = attend.synthetic_plan(SHAPE, groups, ratio, tokens, coarse)
    packed = attend.packed_state(plan, SHAPE, groups, tokens, batch, torch.float32, "cpu")
    load = Load(SHAPE.query_heads, SHAPE.heads, SHAPE.head_dim, tokens, batch, element_bytes=4)
    state = packed.state
    left = tokens - plan.first_tokens - plan.tail_slots
    read = sum_bytes((state.first.key, state.first.value, state.tail.key, state.tail.value))
    for segment in state.segments:
        held = min(segment.slots, left)
        left -= segment.slots
        if held:
            streams = (segment.key, segment.value)
            own = [segment.positions, *(x for stream in streams for x in (stream.codes, stream.scale))]
            read += held / segment.slots * sum_bytes(own) + sum_bytes([x for s in streams for x in s.basis])
    # a sequence's own steps are float32 here; the newest tokens are none of the coarse ones
    assert packed_limits(plan, 0, load, BYTES).bytes == pytest.approx(read, rel=2e-2 if coarse else 1e-3)
    assert read < packed.bytes_read


def test_limit_columns_hold_the_limits_of_the_measured_bandwidth():
    plan = attend.synthetic_plan(SHAPE, 1, 8.0, 2_048)
    load = Load(SHAPE.query_heads, SHAPE.heads, SHAPE.head_dim, 2_048, element_bytes=4)
    slow, fast = (limit_columns(plan, load, "cpu", bandwidth, packed_seconds=1.0) for bandwidth in (1e6, 1e9))
    assert slow["limit"] == "bytes"
    assert slow["limit_of_bytes_ms"] == pytest.approx(1000 * fast["limit_of_bytes_ms"])
    assert slow["share_of_limit"] == pytest.approx(slow["limit_of_bytes_ms"] / 1e3)


def test_instruction_sets_take_turns_with_the_operation():
    sets = [INSTRUCTION_SETS[i] for i in SETS]
    row = attend.measured("SmolLM2-135M", 256, 1, 8.0, 1, torch.float32, "cpu", 1e10, 0.05, 64, sets)
    assert all(row[f"{name}_ms"] > 0 and row[f"{name}_speedup"] > 0 for name in sets)
