"""Which pairs of static buffers get a packed form, and why others do not."""

import re

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import repeat_kv
from capture import capture
from torch import Tensor

from apack_compile.passes import BufferPair, FuseAttend, PackBuffers, Refusal, RemoveDeadCode, run_passes
from apack_compile.passes.buffers.ahead import index_graph
from apack_compile.passes.graph.effects import op_name

BATCH, HEADS, SLOTS, DIM = 2, 2, 24, 8


def inputs(rows: int = 1) -> tuple[Tensor, ...]:
    """Query `[2, 4, n, 8]`, new key and value, buffers `[2, 2, 24, 8]`, positions `[n]`, mask `[1, 1, n, 24]`."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(BATCH, heads, rows, DIM) for heads in (2 * HEADS, HEADS, HEADS))
    keys, values = torch.zeros(BATCH, HEADS, SLOTS, DIM), torch.zeros(BATCH, HEADS, SLOTS, DIM)
    at = torch.arange(5, 5 + rows)
    return query, key, value, keys, values, at, (torch.arange(SLOTS) <= at[:, None])[None, None]


def attend(query, keys, values, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(keys, 2), repeat_kv(values, 2), mask)


def found_in(function, *args) -> list[BufferPair | Refusal]:
    return PackBuffers().match(capture(function, *(args or inputs())).gm.graph)


def index_copy(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at, value)
    return attend(query, keys, values, mask)


def setitem(query, key, value, keys, values, at, mask):
    values[:, :, at] = value
    keys[:, :, at] = key
    return attend(query, keys, values, mask)


def index_put(query, key, value, keys, values, at, mask):
    keys = torch.ops.aten.index_put_(keys, [None, None, at], key)
    values = torch.ops.aten.index_put_(values, [None, None, at], value)
    return attend(query, keys, values, mask)


def counted(query, key, value, keys, values, at, mask):
    where = torch.arange(query.shape[2]) + at[0]
    at.add_(query.shape[2])
    return index_copy(query, key, value, keys, values, where, mask)


def read_twice(query, key, value, keys, values, at, mask):
    first = index_copy(query, key, value, keys, values, at, mask)
    return attend(first, keys, values, mask)


def at_a_slice(query, key, value, keys, values, at, mask):
    keys[:, :, 5 : 5 + key.shape[2]] = key
    values[:, :, 5 : 5 + key.shape[2]] = value
    return attend(query, keys, values, mask)


def copied_into_a_view(query, key, value, keys, values, at, mask):
    keys[:, :, 5 : 5 + key.shape[2]].copy_(key)
    values.narrow(2, 5, key.shape[2]).copy_(value)
    return attend(query, keys, values, mask)


def through_a_view(query, key, value, keys, values, at, mask):
    keys.detach().index_copy_(2, at, key)
    values.detach().index_copy_(2, at, value)
    return attend(query, keys, values, mask)


def through_a_transpose(query, key, value, keys, values, at, mask):
    rotated = keys.transpose(1, 2)
    rotated[:, at] = key.transpose(1, 2)
    values.index_copy_(2, at, value)
    return attend(query, rotated.permute(0, 2, 1, 3), values, mask)


def put_back(query, key, value, keys, values, at, mask):
    new_keys, new_values = keys.index_copy(2, at, key), values.index_copy(2, at, value)
    keys.copy_(new_keys)
    values.copy_(new_values)
    return attend(query, new_keys, new_values, mask)


def keys_read_first(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    repeated = repeat_kv(keys, 2)
    values.index_copy_(2, at, value)
    return F.scaled_dot_product_attention(query, repeated, repeat_kv(values, 2), mask)


PACKED = (index_copy, setitem, index_put, counted, read_twice, at_a_slice, copied_into_a_view, through_a_view)
PACKED += (through_a_transpose, put_back, keys_read_first)


@pytest.mark.parametrize("function", PACKED)
@pytest.mark.parametrize("rows", [1, 5])
def test_buffers_that_attention_alone_reads_get_a_packed_form(function, rows):
    (pair,) = found_in(function, *inputs(rows))
    assert isinstance(pair, BufferPair), pair.reason
    assert pair.key.count == rows


@pytest.mark.parametrize("function", PACKED)
def test_what_read_the_buffers_attends_to_packed_state_and_the_buffers_are_no_inputs(function):
    captured = capture(function, *inputs(3))
    graph = captured.gm.graph
    run_passes(captured.gm, (PackBuffers(), FuseAttend(), RemoveDeadCode()))
    names = [op_name(node) for node in graph.nodes]
    assert names.count("apack::append") == 1
    assert names.count("apack::attend") == (2 if function is read_twice else 1)
    assert not {"apack::unpack", "scaled_dot_product_attention"} & set(names)
    assert not any(node.name in ("l_keys_", "l_values_") for node in graph.nodes)


def grown(query, key, value, keys, values, at, mask):
    keys, values = torch.cat([keys[:, :, 1:], key], 2), torch.cat([values[:, :, 1:], value], 2)
    return attend(query, keys, values, mask), keys, values


def functional(query, key, value, keys, values, at, mask):
    keys, values = keys.index_copy(2, at, key), values.index_copy(2, at, value)
    return attend(query, keys, values, mask), keys, values


def scattered(query, key, value, keys, values, at, mask):
    each = at[:, None].expand(key.shape)
    keys.scatter_(2, each, key)
    values.scatter_(2, each, value)
    return attend(query, keys, values, mask)


def positions_from_numbers(query, key, value, keys, values, at, mask):
    at = at + (query.sum() * 0).long()
    return index_copy(query, key, value, keys, values, at, mask)


def positions_after_many_steps(query, key, value, keys, values, at, mask):
    for _ in range(17):
        at = at + 0
    return index_copy(query, key, value, keys, values, at, mask)


def positions_wrapped_around(query, key, value, keys, values, at, mask):
    return index_copy(query, key, value, keys, values, at % SLOTS, mask)


def positions_kept(query, key, value, keys, values, at, mask):
    state = at.clone()
    return index_copy(query, key, value, keys, values, at.copy_(state), mask)


def values_at_changed_positions(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at + 1, key)
    at.add_(1)
    values.index_copy_(2, at + 1, value)
    return attend(query, keys, values, mask)


def keys_changed_between(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    key.mul_(2)
    values.index_copy_(2, at, value)
    return attend(query, keys, values, mask)


def every_second_slot(query, key, value, keys, values, at, mask):
    keys[:, :, 5:7:2] = key
    values[:, :, 5:7:2] = value
    return attend(query, keys, values, mask)


def from_the_end(query, key, value, keys, values, at, mask):
    keys[:, :, -2:-1] = key
    values[:, :, -2:-1] = value
    return attend(query, keys, values, mask)


def one_token_to_three_slots(query, key, value, keys, values, at, mask):
    keys[:, :, 5:8] = key
    values[:, :, 5:8] = value
    return attend(query, keys, values, mask)


def slice_read(query, key, value, keys, values, at, mask):
    part = keys[:, :, 5:6]
    part.copy_(key)
    values[:, :, 5:6] = value
    return attend(query, keys, values, mask) + part.sum()


def keys_at_a_slice(query, key, value, keys, values, at, mask):
    keys[:, :, 5:6] = key
    values[:, :, at] = value
    return attend(query, keys, values, mask)


def values_of_the_attention(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at, value + 0 * keys[:, :, :1])
    return attend(query, keys, values, mask)


def positions_drawn(query, key, value, keys, values, at, mask):
    return index_copy(query, key, value, keys, values, torch.randint(SLOTS, (1,)), mask)


def positions_written(query, key, value, keys, values, at, mask):
    at.add_(1)
    return index_copy(query, key, value, keys, values, at, mask)


def positions_differ(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at + 1, value)
    return attend(query, keys, values, mask)


def read_before(query, key, value, keys, values, at, mask):
    before = keys.sum()
    return index_copy(query, key, value, keys, values, at, mask) + before


def written_twice(query, key, value, keys, values, at, mask):
    keys[:, :, 0] = 0
    return index_copy(query, key, value, keys, values, at, mask)


def returned(query, key, value, keys, values, at, mask):
    return index_copy(query, key, value, keys, values, at, mask), keys * 2


def one_buffer(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    return attend(query, keys, keys, mask)


def values_not_cached(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    return attend(query, keys, values, mask)


def only_a_part(query, key, value, keys, values, at, mask):
    index_copy(query, key, value, keys, values, at, mask)
    return attend(query, keys[:, :, :16], values[:, :, :16], mask[..., :16])


def no_mask(query, key, value, keys, values, at, mask):
    return index_copy(query, key, value, keys, values, at, None)


def is_causal(query, key, value, keys, values, at, mask):
    index_copy(query, key, value, keys, values, at, mask)
    return F.scaled_dot_product_attention(query, repeat_kv(keys, 2), repeat_kv(values, 2), is_causal=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (grown, r"l_keys_ slides: its oldest tokens leave it, which is no buffer written at positions"),
        (functional, r"index_copy makes a new tensor, which is not put back into l_keys_"),
        (scattered, r"scatter_ is no write at the positions of an index"),
        (every_second_slot, r"setitem writes every 2 slots"),
        (from_the_end, r"setitem writes from slot -2 on, counted from the end"),
        (one_token_to_three_slots, r"setitem does not write one token to each of its positions"),
        (slice_read, r"the slice of l_keys_ that is written is also read by sum"),
        (positions_from_numbers, r"its positions are computed by mul"),
        (positions_after_many_steps, r"its positions are not known before the graph runs: much is computed"),
        (positions_wrapped_around, r"its positions are computed by mod"),
        (positions_kept, r"its positions are kept in l_at_, which the graph writes first"),
        (positions_drawn, r"its positions are computed by randint"),
        (positions_written, r"its positions are changed by add_"),
        (values_at_changed_positions, r"value: its positions are changed by add_"),
        (positions_differ, r"keys are written at l_at_, values at add"),
        (keys_at_a_slice, r"keys are written at 5, values at l_at_"),
        (keys_changed_between, r"mul_ may write l_key_"),
        (values_of_the_attention, r"what index_copy_ writes depends on l_keys_"),
        (read_before, r"l_keys_ is read by sum before it is written"),
        (written_twice, r"l_keys_ is also written by setitem"),
        (returned, r"unpack's tokens are used by output, not only by attention"),
        (one_buffer, r"keys and values are one buffer"),
        (values_not_cached, r"value does not come from a cache"),
        (only_a_part, r"key: getitem between the packed cache and the attention is no head repetition"),
        (no_mask, r"no mask: the empty slots that unpack returns would be attended"),
        (is_causal, r"is_causal aligns the mask with the first of all slots"),
    ],
)
def test_other_buffers_stay_dense_with_a_reason(function, reason):
    captured = capture(function, *inputs())
    torch.manual_seed(0)
    before = captured.run()
    found = PackBuffers().match(captured.gm.graph)
    assert found and not any(isinstance(match, BufferPair) for match in found)
    assert any(re.search(reason, match.reason) for match in found), [match.reason for match in found]
    torch.manual_seed(0)
    torch.testing.assert_close(captured.run(), before, rtol=0, atol=0)


def changed(name: str) -> tuple[Tensor, ...]:
    """Inputs of which one is not as it should be."""
    query, key, value, keys, values, at, mask = inputs()
    stacked = torch.zeros(2, BATCH, HEADS, SLOTS, DIM)
    if name == "stacked":
        keys = stacked[1]
    if name == "strided":
        keys = torch.zeros(BATCH, SLOTS, HEADS, DIM).transpose(1, 2)
    if name == "narrower":
        values = torch.zeros(BATCH, HEADS, SLOTS, DIM, dtype=torch.bfloat16)
        value = value.bfloat16()
    return query, key, value, keys, values, at, mask


def mixed(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at, value)
    return attend(query, keys, values.float(), mask)


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        ("stacked", index_copy, "l_keys_ is a view: it has no memory of its own"),
        ("strided", index_copy, "l_keys_ is a view: it has no memory of its own"),
        (
            "narrower",
            mixed,
            r"keys \(2, 2, 24, 8\) torch.float32 and values \(2, 2, 24, 8\) torch.bfloat16 do not belong together",
        ),
    ],
)
def test_buffers_whose_memory_or_type_does_not_allow_it_stay_dense(name, function, reason):
    found = found_in(function, *changed(name))
    assert any(re.search(reason, match.reason) for match in found), [match.reason for match in found]


def test_a_cache_with_tokens_before_heads_gets_a_packed_form():
    def tokens_first(query, key, value, keys, values, at, mask):
        keys.index_copy_(1, at, key.transpose(1, 2))
        values[:, at] = value.transpose(1, 2)
        return attend(query, keys.transpose(1, 2), values.transpose(1, 2), mask)

    query, key, value, _, _, at, mask = inputs()
    keys, values = torch.zeros(BATCH, SLOTS, HEADS, DIM), torch.zeros(BATCH, SLOTS, HEADS, DIM)
    (pair,) = found_in(tokens_first, query, key, value, keys, values, at, mask)
    assert isinstance(pair, BufferPair) and pair.key.size == (BATCH, HEADS, SLOTS, DIM)


def test_tokens_in_another_place_than_the_second_or_third_dimension_are_refused():
    def last(query, key, value, keys, values, at, mask):
        keys.index_copy_(3, at, key.mT)
        values.index_copy_(3, at, value.mT)
        return attend(query, keys.mT, values.mT, mask)

    query, key, value, keys, values, at, mask = inputs()
    (refused,) = found_in(last, query, key, value, keys.mT.contiguous(), values.mT.contiguous(), at, mask)
    assert (
        refused.reason
        == "key: l_keys_ (2, 2, 8, 24) is neither [B, H_kv, T, D] nor [B, T, H_kv, D], tokens are dimension 3"
    )


def span(start, count):
    """Positions that a decode step with a number as its start is found to write at."""

    def step(query, key, value, keys, values, start, mask):
        keys[:, :, start : start + key.shape[2]] = key
        values.narrow(2, start, key.shape[2]).copy_(value)
        return attend(query, keys, values, mask)

    query, key, value, keys, values, _, _ = inputs(count)
    mask = (torch.arange(SLOTS) <= start + torch.arange(count)[:, None])[None, None]
    captured = capture(step, query, key, value, keys, values, start, mask, dynamic=True)
    (pair,) = PackBuffers().match(captured.gm.graph)
    assert isinstance(pair, BufferPair), pair.reason
    (found,) = torch.fx.GraphModule(captured.gm, index_graph(captured.gm.graph, [pair]))(*captured.inputs)
    return found


@pytest.mark.parametrize(("start", "count"), [(7, 1), (0, 5), (11, 6)])
def test_positions_of_a_slice_are_known_before_the_graph_runs(start, count):
    assert span(start, count).tolist() == list(range(start, start + count))
