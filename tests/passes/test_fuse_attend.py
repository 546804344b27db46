"""The rewritten graph computes what the original did, within the original's own rounding."""

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import ATTENTIONS, HEAD_SHARING, NEGATIVES, Case, State, five_dimensions, repeat_kv, update
from capture import Captured, capture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_lists import append_lists, state_of
from torch import Tensor

from apack_compile.passes import FuseAttend, GraphRecord, RemoveDeadCode, run_passes

PASSES = (FuseAttend(), RemoveDeadCode())
CASES = st.builds(
    Case,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    head_dim=st.sampled_from([4, 7, 16]),
    gqa=st.sampled_from(sorted(HEAD_SHARING)),
    mask=st.sampled_from(["bool", "float", "full", "sliding"]),
    scale=st.sampled_from([None, 0.25]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    attention=st.sampled_from(sorted(ATTENTIONS)),
)


def runs(case: Case) -> bool:
    """enable_gqa is an argument of the fused spelling; grouped rows share one mask row only when there is one query row."""
    shared_row = case.gqa == "grouped_query" and case.rows > 1 and case.mask != "full"
    return (case.gqa != "enable_gqa" or case.attention == "sdpa") and not shared_row


def in_double(case: Case, inputs: tuple) -> Tensor:
    """The attention over the same inputs in float64, outside any graph."""
    query, key, value, state, mask = inputs
    mask = mask.double() if mask.is_floating_point() else mask
    return case.function()(query.double(), key.double(), value.double(), state.double(), mask)


def assert_no_worse(new: Tensor, old: Tensor, exact: Tensor) -> None:
    """The rewritten result is no further from float64 than the original, times a small constant."""
    floor = torch.finfo(old.dtype).eps * float(exact.abs().max())
    allowed = 3 * float((old.double() - exact).abs().max()) + floor
    assert float((new.double() - exact).abs().max()) <= allowed


def rewritten(captured: Captured) -> GraphRecord:
    return run_passes(captured.gm, PASSES)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=CASES.filter(runs), seed=st.integers(0, 1000))
def test_rewritten_attention_is_as_close_to_float64_as_the_original(case, seed):
    exact = in_double(case, case.inputs(seed))
    captured = capture(case.function(), *case.inputs(seed))
    (old,), old_state = captured.run()
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (1, 0)
    record = rewritten(captured)
    assert [site.reason for site in record.sites] == [None]
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (0, 1)
    assert [captured.count(name) for name in ("scaled_dot_product_attention", "softmax", "matmul", "einsum")] == [0] * 4
    (new,), new_state = captured.run()
    assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert_no_worse(new, old, exact)
    for before, after in zip(old_state, new_state, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NEGATIVES)
def test_a_refused_graph_stays_as_it_was(name):
    captured = capture(NEGATIVES[name][0], *Case().inputs())
    code = captured.gm.code
    record = rewritten(captured)
    assert all(p.count == 0 for p in record.passes)
    assert captured.gm.code == code


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_every_spelling_becomes_one_attend(attention, mask):
    case = Case(rows=2, mask=mask, attention=attention, dtype=torch.float64)
    captured = capture(case.function(), *case.inputs())
    (old,), _ = captured.run()
    record = rewritten(captured)
    assert [site.reason for site in record.sites] == [None]
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (0, 1)
    (new,), _ = captured.run()
    torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_that_autocast_casts_is_attended_in_the_dtype_of_the_cache(query_dtype):
    def attend(q: Tensor, k: Tensor, v: Tensor, state: State, mask: Tensor, lower: bool = False):
        keys, values = update(k, v, state)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)

    query, key, value, state, mask = Case().inputs()
    query = query.to(query_dtype)
    exact = attend(query.double(), key.double(), value.double(), state.double(), mask)
    captured = capture(attend, query, *Case().inputs()[1:], True)
    (old,), _ = captured.run()
    rewritten(captured)
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (0, 1)
    (new,), _ = captured.run()
    assert new.dtype == old.dtype == torch.bfloat16
    assert_no_worse(new, old, exact)


@pytest.mark.parametrize("mask", ["bool", "full"])
def test_a_query_grouped_in_five_dimensions_becomes_one_attend(mask):
    case = Case(groups=3, rows=2, mask="bool", dtype=torch.float64)
    *inputs, bool_mask = case.inputs()
    if mask == "full":
        bool_mask = bool_mask.expand(2, 1, 2, -1).clone()
        bool_mask[0, :, :, 3] = False
    captured = capture(five_dimensions, *inputs, bool_mask)
    (old,), _ = captured.run()
    rewritten(captured)
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (0, 1)
    (new,), _ = captured.run()
    torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


def test_the_result_of_one_attention_may_be_the_query_of_the_next():
    def two(q: Tensor, k: Tensor, v: Tensor, state: State, other: State, mask: Tensor):
        for held in (state, other):
            keys, values = update(k, v, held)
            q = F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)
        return q

    case = Case()
    q, k, v, state, mask = case.inputs()
    captured = capture(two, q, k, v, state, case.state(), mask)
    (old,), _ = captured.run()
    assert rewritten(captured).passes[0].count == 2
    (new,), _ = captured.run()
    torch.testing.assert_close(new, old)


def test_keys_read_elsewhere_too_keep_their_unpack_and_both_results_stay_right():
    def both(q: Tensor, k: Tensor, v: Tensor, state: State, mask: Tensor):
        keys, values = update(k, v, state)
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask), keys * 2

    captured = capture(both, *Case().inputs())
    (old, old_keys), _ = captured.run()
    rewritten(captured)
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (1, 1)
    (new, new_keys), _ = captured.run()
    torch.testing.assert_close(new, old)
    torch.testing.assert_close(new_keys, old_keys, rtol=0, atol=0)


def test_keys_written_after_the_attention_do_not_disturb_it():
    def later(q: Tensor, k: Tensor, v: Tensor, state: State, mask: Tensor):
        keys, values = update(k, v, state)
        out = F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)
        return out, keys.mul_(2)

    captured = capture(later, *Case().inputs())
    (old, old_keys), _ = captured.run()
    record = rewritten(captured)
    assert record.sites[0].reason is None
    (new, new_keys), _ = captured.run()
    torch.testing.assert_close(new, old)
    torch.testing.assert_close(new_keys, old_keys, rtol=0, atol=0)


def test_a_cache_appended_to_twice_reads_the_state_of_its_own_step():
    def steps(q: Tensor, k: Tensor, v: Tensor, state: State, mask: Tensor):
        outs = []
        for _ in range(2):
            keys, values = update(k, v, state)
            outs.append(F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask))
            mask = mask | mask.roll(1, -1)
        return outs

    captured = capture(steps, *Case().inputs())
    old, _ = captured.run()
    rewritten(captured)
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (0, 2)
    new, _ = captured.run()
    for before, after in zip(old, new, strict=True):
        torch.testing.assert_close(after, before)


def with_coarse(state: State) -> State:
    """The state with position 1 in a coarse segment before vision, instead of among the first."""
    stored = [x[:, :1, :1].repeat(1, 1, 1, x.shape[1]).flatten(3) for x in state.dense[:2]]
    none, first = torch.empty(0, dtype=torch.float16), state.positions[0].clone()
    first[:, 1] = -1
    positions = [first, torch.ones_like(first[:, :1]), *state.positions[1:]]
    codes = [x for store in stored for x in (store, none.clone())] + state.codes
    bases = [torch.empty(0) for _ in range(6)] + state.bases
    return state._replace(codes=codes, bases=bases, bands=[0] * 8 + state.bands, positions=positions)


@pytest.mark.parametrize(("relative", "pairs"), [(True, 0), (True, 3), (True, 4), (False, 0)])
def test_three_packed_segments_and_their_rotations_go_over(relative, pairs):
    def attention(q: Tensor, k: Tensor, v: Tensor, state: State, mask: Tensor, rotations: list[Tensor]):
        by = {"rotations": rotations, "block": 4, "interleaved_pairs": pairs} if relative else {}
        text_by = {"text_rotations": rotations[-1], "block": 4} if relative else {}
        stores = [*state.dense[2:], *state.codes[-4:]]
        lists = append_lists(stores, state.bases[-6:], state.bands[-8:], state.cursor, **text_by)
        torch.ops.apack.append(k, v, *lists)
        keys, values = torch.ops.apack.unpack(k, v, *state_of(*state, **by).flatten(), mask.shape[-1])
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)

    query, key, value, state, mask = Case().inputs()
    angles = [torch.randn(2, -(-slots.shape[1] // 4), 3) for slots in with_coarse(state).positions[1:]]
    rotations = [torch.stack([a.cos(), a.sin()], 2) for a in angles]
    captured = capture(attention, query, key, value, with_coarse(state), mask, rotations)
    (old,), _ = captured.run()
    rewritten(captured)
    assert (captured.count("apack::unpack"), captured.count("apack::attend")) == (0, 1)
    (new,), _ = captured.run()
    torch.testing.assert_close(new, old)
    (without,), _ = capture(
        attention, query, key, value, with_coarse(state), mask, [x.roll(1, 2) for x in rotations]
    ).run()
    assert torch.allclose(without, old) != relative


def test_the_new_node_keeps_shape_and_origin_of_the_old():
    captured = capture(Case().function(), *Case().inputs())
    rewritten(captured)
    (node,) = [n for n in captured.gm.graph.nodes if n.target is torch.ops.apack.attend.default]
    assert tuple(node.meta["example_value"].shape) == (2, 4, 1, 8)
    assert "scaled_dot_product_attention" in node.meta["stack_trace"]


def test_dumps_show_the_graph_before_and_after(tmp_path):
    captured = capture(Case().function(), *Case().inputs())
    run_passes(captured.gm, PASSES, tmp_path)
    before, after = ((tmp_path / "graph_000" / f"0_FuseAttend_{when}.txt").read_text() for when in ("before", "after"))
    assert "scaled_dot_product_attention(" in before
    assert "apack.attend.default(" not in before
    assert "apack.attend.default(" in after
    assert (tmp_path / "graph_000" / "record.json").exists()
