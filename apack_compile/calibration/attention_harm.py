"""How much attention suffers when cached keys and values are disturbed, where a model has no gradients.

A layer's harm is the error of what its newest queries get from attention, relative to what they get. Its second order needs
no pass backwards through the model, only through one attention, which is a few products: for a query q, with weights p over
tokens and output o, and a direction u of the output, the gradient of u . o is p_t u by the value of token t and
p_t ((v_t - o) . u) scale q by its key. With u drawn at random, of length 1 / |o|, these gradients have the second moment of
the relative error: they go where those of the model's log-probabilities would (sensitivity.py), and are of the same shape.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apack_compile.kernels.autocast import without_autocast

# Directions drawn for each query; 16 were no better (docs/notes/quality.md).
DRAWS = 4
NOT_SEEN = "no scaled_dot_product_attention was seen; call calibrate(model, inputs)"


@dataclass(frozen=True)
class Read:
    """What some queries ask of the tokens that a layer holds.

    query: `[B, H_q, Q, D]`, rotated as the keys are. at: their tokens, int64 `[B, Q]`. mask: as for scaled_dot_product_attention,
    `[B, H_q, Q, T]` or broadcast; None where each sees its own token and those before. scale: of the scores.
    """

    query: Tensor
    at: Tensor
    mask: Tensor | None
    scale: float


@dataclass(frozen=True)
class Reads:
    """What some queries of an input read of each layer.

    states: K and V `[B, H_kv, T, D]` by layer. hidden: bool `[B, Q]`, queries that do not count.
    """

    by_layer: Mapping[int, Read]
    states: Mapping[int, tuple[Tensor, Tensor]]
    hidden: Tensor | None
    draws: int = DRAWS

    def draw(self, receive: Callable[[int, int, Tensor], None], layers: Collection[int]) -> str | None:
        """Call `receive` with layer, stream and gradient `[B, H_kv, T, D]`, for every draw, of these layers."""
        read = {layer: self.by_layer[layer] for layer in layers if layer in self.by_layer}
        for layer, one in read.items():
            for gradients in drawn_gradients(one, *self.states[layer], self.hidden, self.draws):
                for stream, gradient in enumerate(gradients):
                    receive(layer, stream, gradient)
        return None if read else NOT_SEEN


@dataclass(frozen=True)
class Attended:
    """An attention with the R queries of each KV head.

    query: `[B, H_kv, R, D]`. weights: `[B, H_kv, R, T]`. output: `[B, H_kv, R, D_v]`. scale: of the scores.
    """

    query: Tensor
    weights: Tensor
    output: Tensor
    scale: float


@without_autocast
def drawn_gradients(
    read: Read, key: Tensor, value: Tensor, hidden: Tensor | None = None, draws: int = DRAWS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of a layer's output in random directions by its keys `[B, H_kv, T, D]` and values `[B, H_kv, T, D_v]`, for each draw.

    Their second moment is that of the output's relative error, per query over all heads; what a query reads of its own token, which
    decoding never packs, does not count. hidden: bool `[B, Q]`, queries that do not count. They are float32 or better.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    key, value = key.to(dtype), value.to(dtype)
    attended = attention_of(read, key, value)
    by_query = attended.output.unflatten(2, (-1, read.query.shape[2]))
    own = read.at[:, None, None, :, None].expand(*by_query.shape[:-1], 1)
    attended.weights.view(*by_query.shape[:-1], -1).scatter_(-1, own, 0.0)
    length = by_query.square().sum((1, 2, 4), keepdim=True).sqrt()
    counted = length > 0 if hidden is None else (length > 0) & ~hidden.to(length.device)[:, None, None, :, None]
    factor = counted / length.masked_fill(~counted, 1.0)
    generator = torch.Generator(device=key.device).manual_seed(0)
    for _ in range(draws):
        drawn = torch.randn(by_query.shape, generator=generator, dtype=dtype, device=key.device)
        yield gradients_along((factor * drawn).flatten(2, 3), attended, value)


def attention_of(read: Read, key: Tensor, value: Tensor) -> Attended:
    """What a read gets from keys `[B, H_kv, T, D]` and values `[B, H_kv, T, D_v]`; a query that sees nothing gets zeros."""
    (rows, heads, queries, _), (kv_heads, tokens) = read.query.shape, key.shape[1:3]
    query = read.query.to(key.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    scores = (query @ key.mT).mul_(read.scale)
    mask = read.mask
    if mask is None:
        mask = (torch.arange(tokens, device=key.device) <= read.at[..., None])[:, None]
    by_head = scores.view(rows, heads, queries, tokens)
    if mask.dtype == torch.bool:
        by_head.masked_fill_(~mask, float("-inf"))
    else:
        by_head += mask
    weights = scores.softmax(-1).nan_to_num(0.0)
    return Attended(query, weights, weights @ value, read.scale)


def gradients_along(direction: Tensor, attended: Attended, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `direction . output`, summed over queries, by key `[B, H_kv, T, D]` and value `[B, H_kv, T, D_v]`."""
    by_score = direction @ value.mT
    by_score -= (direction * attended.output).sum(-1, keepdim=True)
    by_score *= attended.weights
    return by_score.mT @ attended.query.mul(attended.scale), attended.weights.mT @ direction


def read_of(named: dict[str, Any], at: Tensor) -> Read:
    """What the queries of tokens `at` `[B, Q]` of a scaled_dot_product_attention over their own prompt read, by its arguments."""
    query, mask, tokens = named["query"].detach(), named["attn_mask"], named["query"].shape[2]
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], tokens, -1)
        mask = mask[(None,) * (4 - mask.dim())].expand(len(at), -1, -1, -1)
        mask = rows_at(mask, at)
    elif not named["is_causal"]:
        mask = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    scale = query.shape[-1] ** -0.5 if named["scale"] is None else named["scale"]
    return Read(rows_at(query, at), at, mask, scale)


def rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` `[B, Q]` of `[B, H, T, N]`."""
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
