"""Gradients of one attention in random directions against autograd and against the error of its output."""

import pytest
import torch
from tiny_llama import VOCABULARY, gemma3, llama
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import apack_compile
from apack_compile.calibration.attention_harm import (
    Read,
    attention_of,
    drawn_gradients,
    gradients_along,
)
from apack_compile.models.cache_argument import with_cache

ROWS, KV_HEADS, HEADS, QUERIES, TOKENS, KEY_DIM, VALUE_DIM = 2, 3, 6, 5, 23, 7, 9
WINDOW = 11


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def states() -> tuple[Tensor, Tensor, Tensor]:
    query = drawn(ROWS, HEADS, QUERIES, KEY_DIM, seed=1)
    return query, drawn(ROWS, KV_HEADS, TOKENS, KEY_DIM, seed=2), drawn(ROWS, KV_HEADS, TOKENS, VALUE_DIM, seed=3)


def newest() -> Tensor:
    return torch.arange(TOKENS - QUERIES, TOKENS).expand(ROWS, -1)


def causal() -> Tensor:
    return torch.ones(QUERIES, TOKENS, dtype=torch.bool).tril(TOKENS - QUERIES)


def padded() -> Tensor:
    mask = causal().expand(ROWS, 1, -1, -1).clone()
    mask[0, :, :, :6] = False
    mask[1, :, 2] = False
    return mask


MASKS = {
    "newest": None,
    "window": causal().triu(TOKENS - QUERIES - WINDOW + 1),
    "padding and a query that sees nothing": padded(),
    "added": drawn(1, HEADS, QUERIES, TOKENS, seed=4).masked_fill(~causal(), torch.finfo(torch.float64).min),
}


def by_autograd(read: Read, key: Tensor, value: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of direction . output by key and value, of torch's own attention."""
    key, value = key.clone().requires_grad_(), value.clone().requires_grad_()
    mask = causal() if read.mask is None else read.mask
    out = scaled_dot_product_attention(read.query, key, value, attn_mask=mask, scale=read.scale, enable_gqa=True)
    return torch.autograd.grad((out.nan_to_num(0.0).view_as(direction) * direction).sum(), (key, value))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [KEY_DIM**-0.5, 0.9])
def test_gradients_along_a_direction_are_those_of_autograd(mask, scale):
    query, key, value = states()
    read = Read(query, newest(), mask, scale)
    direction = drawn(ROWS, KV_HEADS, HEADS // KV_HEADS * QUERIES, VALUE_DIM, seed=5)
    found = gradients_along(direction, attention_of(read, key, value), value)
    torch.testing.assert_close(found, by_autograd(read, key, value, direction))


def relative_error(read: Read, key: Tensor, value: Tensor, changed_key: Tensor, changed_value: Tensor) -> Tensor:
    """Squared error of the output over its square, summed over queries."""
    given = (key, value), (changed_key, changed_value)
    exact, found = (attention_of(read, *both).output.unflatten(2, (-1, QUERIES)) for both in given)
    return ((found - exact).square().sum((1, 2, 4)) / exact.square().sum((1, 2, 4))).sum()


def test_their_second_moment_is_that_of_the_relative_error_of_the_output():
    query, key, value = states()
    read, token, head = Read(query, newest(), None, KEY_DIM**-0.5), 14, 1
    draws = list(drawn_gradients(read, key, value, draws=4_000))
    for stream, width in enumerate((KEY_DIM, VALUE_DIM)):
        found = torch.stack([both[stream][0, head, token] for both in draws])

        def error(change: Tensor, stream=stream) -> Tensor:
            changed = [key.clone(), value.clone()]
            changed[stream][0, head, token] += change
            return relative_error(read, key, value, *changed)

        moment = torch.autograd.functional.hessian(error, torch.zeros(width, dtype=torch.float64)) / 2
        difference = found.mT @ found / len(draws) - moment
        assert float(difference.norm() / moment.norm()) < 0.1


def test_queries_that_are_padding_say_nothing_of_any_token():
    query, key, value = states()
    hidden = torch.zeros(ROWS, QUERIES, dtype=torch.bool)
    hidden[1, 2:] = True
    found = list(drawn_gradients(Read(query, newest(), None, 1.0), key, value, hidden))
    query = query.clone()
    query[1, :, 2:] = 7.0
    for both, others in zip(found, drawn_gradients(Read(query, newest(), None, 1.0), key, value, hidden), strict=True):
        torch.testing.assert_close(both, others)
    everything = torch.ones(ROWS, QUERIES, dtype=torch.bool)
    assert not any(
        g.any() for both in drawn_gradients(Read(query, newest(), None, 1.0), key, value, everything) for g in both
    )


def test_what_a_query_reads_of_its_own_token_does_not_count():
    query, key, value = states()
    at = torch.tensor([[TOKENS - 2, 3, 9, 3, TOKENS - 1]]).expand(ROWS, -1)
    for key_gradient, value_gradient in drawn_gradients(Read(query, at, None, 1.0), key, value):
        for gradient in (key_gradient, value_gradient):
            # the newest token has no other reader
            assert gradient[:, :, 9].any() and not gradient[:, :, TOKENS - 1].any()


def test_half_precision_gives_float32():
    query, key, value = (x.bfloat16() for x in states())
    for key_gradient, value_gradient in drawn_gradients(Read(query, newest(), None, 0.4), key, value):
        assert key_gradient.dtype == value_gradient.dtype == torch.float32
        assert (key_gradient.shape, value_gradient.shape) == (key.shape, value.shape)


@pytest.mark.parametrize("make", [llama, gemma3])
def test_what_a_first_prompt_s_newest_queries_read_gives_their_outputs(make):
    model, (tokens, newest) = apack_compile.optimize(make(), ratio=2, compile="none", min_tokens=0), (80, 10)
    ids = torch.randint(4, VOCABULARY, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache, outputs, held = apack_compile.new_cache(model, 8), {}, {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, i=i: outputs.update({i: args[0]}))

    def keep(module: torch.nn.Module, args: tuple) -> None:
        # the probe of how keys rotate comes first
        if cache.held_back is not None:
            held.update(reads=cache.held_back.prompt.reads, states=dict(cache.held_back.states))

    model.lm_head.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(**with_cache(model, {"input_ids": ids, "attention_mask": mask}, cache))
    reads = held["reads"]
    assert sorted(reads) == list(range(len(model.model.layers))) and cache.is_filled
    for layer, read in reads.items():
        found = attention_of(read, *held["states"][layer]).output.unflatten(2, (-1, newest))
        expected = outputs[layer].gather(1, read.at[..., None].expand(-1, -1, outputs[layer].shape[2]))
        torch.testing.assert_close(found.flatten(1, 2).transpose(1, 2).flatten(2), expected)
        assert read.at.sort().values.tolist() == [list(range(tokens - newest, tokens))] * ROWS
