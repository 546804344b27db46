"""Which pairs of static buffers get a packed form, and why others do not."""

import re

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import repeat_kv
from capture import capture
from torch import Tensor

from apack_compile.passes import BufferPair, PackBuffers, Refusal

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


@pytest.mark.parametrize("function", [index_copy, setitem, index_put, counted, read_twice])
@pytest.mark.parametrize("rows", [1, 5])
def test_buffers_that_attention_alone_reads_get_a_packed_form(function, rows):
    (pair,) = found_in(function, *inputs(rows))
    assert isinstance(pair, BufferPair), pair.reason
    assert pair.key.count == rows


def at_a_slice(query, key, value, keys, values, at, mask):
    keys[:, :, 5:6] = key
    values[:, :, 5:6] = value
    return attend(query, keys, values, mask)


def copied_into_a_view(query, key, value, keys, values, at, mask):
    keys[:, :, 5:6].copy_(key)
    values[:, :, 5:6].copy_(value)
    return attend(query, keys, values, mask)


def through_a_view(query, key, value, keys, values, at, mask):
    keys.detach().index_copy_(2, at, key)
    values.detach().index_copy_(2, at, value)
    return attend(query, keys, values, mask)


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
    for _ in range(16):
        at = at + 0
    return index_copy(query, key, value, keys, values, at, mask)


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


def read_between(query, key, value, keys, values, at, mask):
    keys.index_copy_(2, at, key)
    repeated = repeat_kv(keys, 2)
    values.index_copy_(2, at, value)
    return F.scaled_dot_product_attention(query, repeated, repeat_kv(values, 2), mask)


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
        (at_a_slice, r"setitem at slice\(5, 6, None\), which is no tensor of positions"),
        (copied_into_a_view, r"copy_ writes through a view of l_keys_"),
        (through_a_view, r"index_copy_ writes through a view of l_keys_"),
        (grown, r"cat and slice makes a new tensor: there is no static buffer"),
        (functional, r"index_copy makes a new tensor: there is no static buffer"),
        (scattered, r"scatter is none of index_copy, index_put and setitem"),
        (positions_from_numbers, r"the positions at_16 are no graph input: much is computed"),
        (positions_drawn, r"the positions randint are no graph input: randint computes it"),
        (positions_written, r"the positions l_at_ are written by add_ in the graph"),
        (positions_differ, r"keys are written at l_at_, values at add"),
        (read_before, r"l_keys_ is read by sum before it is written"),
        (read_between, r"l_keys_ is read before index_copy__1 has written the other buffer"),
        (written_twice, r"l_keys_ is also written by setitem"),
        (returned, r"unpack's tokens are used by output, not only by attention"),
        (one_buffer, r"keys and values are one buffer"),
        (values_not_cached, r"value comes from no known update of a buffer"),
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


def test_a_cache_with_tokens_before_heads_stays_dense():
    def tokens_first(query, key, value, keys, values, at, mask):
        keys.index_copy_(1, at, key.transpose(1, 2))
        values.index_copy_(1, at, value.transpose(1, 2))
        return attend(query, keys.transpose(1, 2), values.transpose(1, 2), mask)

    query, key, value, _, _, at, mask = inputs()
    keys, values = torch.zeros(BATCH, SLOTS, HEADS, DIM), torch.zeros(BATCH, SLOTS, HEADS, DIM)
    (refused,) = found_in(tokens_first, query, key, value, keys, values, at, mask)
    assert refused.reason == "key: tokens are dimension 1 of (2, 24, 2, 8); [B, H_kv, max_len, D] is known"
