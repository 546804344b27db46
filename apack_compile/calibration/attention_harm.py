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

    query: `[B, H_q, Q, D]`, rotated as the keys are. mask: as for scaled_dot_product_attention, `[B, H_q, Q, T]` or broadcast; None
    where queries are those of the newest tokens, and each sees its own and those before. scale: of the scores.
    """

    query: Tensor
    mask: Tensor | None
    scale: float


@dataclass(frozen=True)
class Reads:
    """What the newest queries of an input read of each layer.

    states: K and V `[B, H_kv, T, D]` by layer. hidden: bool `[B, Q]`, queries that are padding. cached: tokens before the queries.
    """

    by_layer: Mapping[int, Read]
    states: Mapping[int, tuple[Tensor, Tensor]]
    hidden: Tensor | None
    cached: int
    draws: int = DRAWS

    def draw(self, receive: Callable[[int, int, Tensor], None], layers: Collection[int]) -> str | None:
        """Call `receive` with layer, stream and gradient `[B, H_kv, cached, D]`, for every draw, of these layers."""
        read = {layer: self.by_layer[layer] for layer in layers if layer in self.by_layer}
        for layer, one in read.items():
            for gradients in drawn_gradients(one, *self.states[layer], self.hidden, self.draws):
                for stream, gradient in enumerate(gradients):
                    receive(layer, stream, gradient[:, :, : self.cached])
        return None if read else NOT_SEEN


@dataclass(frozen=True)
class Attended:
    """An attention with query heads by KV head: query `[B, H_kv, N, Q, D]`, weights `[B, H_kv, N, Q, T]`, output `[B, H_kv, N, Q, D_v]`."""

    query: Tensor
    weights: Tensor
    output: Tensor
    scale: float


@without_autocast
def drawn_gradients(
    read: Read, key: Tensor, value: Tensor, hidden: Tensor | None = None, draws: int = DRAWS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of a layer's output in random directions by its keys `[B, H_kv, T, D]` and values `[B, H_kv, T, D_v]`, for each draw.

    Their second moment is that of the output's relative error, per query over all heads. hidden: bool `[B, Q]`, queries that are
    padding. They are float32 or better.
    """
    attended = attention_of(read, key, value)
    length = attended.output.square().sum((1, 2, 4), keepdim=True).sqrt()
    counted = length > 0 if hidden is None else (length > 0) & ~hidden[:, None, None, :, None]
    factor = counted / length.masked_fill(~counted, 1.0)
    generator = torch.Generator(device=key.device).manual_seed(0)
    for _ in range(draws):
        shape, kind = attended.output.shape, {"dtype": factor.dtype, "device": factor.device}
        yield gradients_along(factor * torch.randn(shape, generator=generator, **kind), attended, value)


def attention_of(read: Read, key: Tensor, value: Tensor) -> Attended:
    """What a read gets from keys `[B, H_kv, T, D]` and values `[B, H_kv, T, D_v]`; a query that sees nothing gets zeros."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    key, value = key.to(dtype), value.to(dtype)
    (rows, heads, queries, _), (kv_heads, tokens) = read.query.shape, key.shape[1:3]
    query = read.query.to(dtype).unflatten(1, (kv_heads, -1))
    scores = query @ key[:, :, None].mT * read.scale
    mask = read.mask
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=key.device).tril(tokens - queries)
    mask = mask.expand(rows, heads, queries, tokens).unflatten(1, (kv_heads, -1))
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0.0)
    return Attended(query, weights, weights @ value[:, :, None], read.scale)


def gradients_along(direction: Tensor, attended: Attended, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `direction . output`, summed over queries, by key `[B, H_kv, T, D]` and value `[B, H_kv, T, D_v]`."""
    along = direction @ value[:, :, None].to(direction.dtype).mT
    centered = along - (direction * attended.output).sum(-1, keepdim=True)
    by_key = (attended.weights * centered * attended.scale).mT @ attended.query
    return by_key.sum(2), (attended.weights.mT @ direction).sum(2)


def read_of(named: dict[str, Any], newest: int) -> Read:
    """What the `newest` queries of a scaled_dot_product_attention over their own prompt read, by its arguments."""
    query, mask, tokens = named["query"], named["attn_mask"], named["query"].shape[2]
    rows = slice(tokens - newest, None)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], tokens, -1)[..., rows, :].clone()
    elif not named["is_causal"]:
        mask = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    scale = query.shape[-1] ** -0.5 if named["scale"] is None else named["scale"]
    return Read(query.detach()[:, :, rows].clone(), mask, scale)
