"""Heads that are repeated before attention on a CPU are shared by the attention instead, with the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import repeat_kv
from capture import capture
from torch import Tensor

from apack_compile.passes import RemoveDeadCode, ShareHeads, run_passes
from apack_compile.passes.attention.share_heads import MOST_ROWS
from apack_compile.passes.graph.nodes import shape

PASSES = (ShareHeads(), RemoveDeadCode())


def inputs(dtype=torch.float32, rows=1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query `[2, 6, rows, 16]`, key and value `[2, 2, 33, 16]`, mask."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 16).to(dtype) for heads, n in ((6, rows), (2, 33), (2, 33)))
    return query, key, value, torch.rand(2, 1, rows, 33) > 0.3


def expanded(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3), mask)


def interleaved(query, key, value, mask):
    key, value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, value=value, key=key, attn_mask=mask, scale=0.3)


def unmasked(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3))


def added(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3), (~mask).to(query.dtype) * -4)


def one_row_of_mask(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3), mask[:1, :, :1])


def shared_already(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def mask_of_heads(query, key, value, mask):
    by_head = mask & (torch.arange(6)[:, None, None] < torch.arange(33) + 1)
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3), by_head)


def causal(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3), is_causal=True)


AS_ROWS = [expanded, interleaved, unmasked, added, one_row_of_mask, shared_already]


def query_sizes(captured) -> list[list[int]]:
    """Sizes of the queries of the graph's attentions."""
    nodes = [node for node in captured.gm.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    return [list(shape(node.args[0])) for node in nodes]


@pytest.mark.parametrize("function", [*AS_ROWS, mask_of_heads, causal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_the_result_is_the_same_and_the_repetition_is_gone(function, dtype, rows):
    captured = capture(function, *inputs(dtype, rows))
    (expected,), _ = captured.run()
    exact = function(*(x.double() if x.is_floating_point() else x for x in inputs(dtype, rows)))
    as_rows = function in AS_ROWS and rows <= MOST_ROWS
    record = run_passes(captured.gm, PASSES)
    (out,), _ = captured.run()
    if function is not shared_already or as_rows:
        assert record.shared_heads[0].details == {"repeats": 3}
    assert query_sizes(captured) == [[2, 2, 3 * rows, 16] if as_rows else [2, 6, rows, 16]]
    assert captured.count("reshape") == captured.count("repeat_interleave") == 0
    error, before = (float((x.double() - exact).abs().max()) for x in (out, expected))
    assert error <= 2 * before + 1e-15


def tiled(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key.repeat(1, 3, 1, 1), value.repeat(1, 3, 1, 1), mask)


def key_alone(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), value.repeat(1, 3, 1, 1), mask)


def written_after(query, key, value, mask):
    repeated = repeat_kv(key, 3)
    key.zero_()
    return F.scaled_dot_product_attention(query, repeated, repeat_kv(value, 3), mask)


def spelled_out(query, key, value, mask):
    scores = (query @ repeat_kv(key, 3).mT).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ repeat_kv(value, 3)


@pytest.mark.parametrize("function", [tiled, key_alone, written_after, spelled_out])
def test_what_is_no_repetition_of_key_and_value_as_they_are_stays(function):
    captured = capture(function, *inputs())
    before = captured.run()
    assert run_passes(captured.gm, PASSES).shared_heads == ()
    torch.testing.assert_close(captured.run(), before, rtol=0, atol=0)


def test_an_attention_that_needs_a_gradient_stays():
    def trained(query, key, value, mask):
        return expanded(query * 1, key, value, mask)

    query, *others = inputs()
    captured = capture(trained, query.requires_grad_(), *others)
    assert ShareHeads().match(captured.gm.graph) == []


def test_a_batch_of_any_size_has_its_heads_as_rows_too():
    seen = []

    def backend(gm, example_inputs):
        seen.append(run_passes(gm, PASSES))
        return gm.forward

    compiled = torch.compile(expanded, backend=backend, dynamic=False)
    for batch in (2, 3):
        query, key, value, mask = (x[:1].expand(batch, -1, -1, -1).contiguous() for x in inputs())
        for tensor in (query, key, value, mask):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(
            compiled(query, key, value, mask), expanded(query, key, value, mask), rtol=1e-5, atol=1e-6
        )
    assert len(seen) == 1 and len(seen[0].shared_heads) == 1


@pytest.mark.parametrize("value_width", [16, 24])
@pytest.mark.parametrize("rows", [1, 5])
def test_views_of_the_result_stay_views(rows, value_width):
    def viewed(query, key, value, mask):
        out = F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3), mask)
        return out.view(2, -1, value_width)

    query, key, _, mask = inputs(rows=rows)
    captured = capture(viewed, query, key, torch.randn(2, 2, 33, value_width), mask)
    (expected,), _ = captured.run()
    assert len(run_passes(captured.gm, PASSES).shared_heads) == 1
    (out,), _ = captured.run()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_attentions_one_after_another():
    def twice(query, key, value, mask):
        return expanded(expanded(query, key, value, mask), key, value, mask)

    captured = capture(twice, *inputs())
    (expected,), _ = captured.run()
    assert len(run_passes(captured.gm, PASSES).shared_heads) == 2
    (out,), _ = captured.run()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert query_sizes(captured) == [[2, 2, 3, 16]] * 2
