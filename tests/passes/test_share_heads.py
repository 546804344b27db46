"""Heads that are repeated before attention on a CPU are shared by the attention instead, with the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import repeat_kv
from capture import capture
from torch import Tensor

from apack_compile.passes import RemoveDeadCode, ShareHeads, run_passes

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


def causal(query, key, value, mask):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 3), repeat_kv(value, 3), is_causal=True)


@pytest.mark.parametrize("function", [expanded, interleaved, causal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 33])
def test_the_result_is_the_same_and_the_repetition_is_gone(function, dtype, rows):
    captured = capture(function, *inputs(dtype, rows))
    (expected,), _ = captured.run()
    exact = function(*(x.double() if x.is_floating_point() else x for x in inputs(dtype, rows)))
    record = run_passes(captured.gm, PASSES)
    (out,), _ = captured.run()
    assert record.shared_heads[0].details == {"repeats": 3}
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


def shared_already(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def spelled_out(query, key, value, mask):
    scores = (query @ repeat_kv(key, 3).mT).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ repeat_kv(value, 3)


@pytest.mark.parametrize("function", [tiled, key_alone, written_after, shared_already, spelled_out])
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
