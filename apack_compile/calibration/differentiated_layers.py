"""Cache layers of a dense model whose next tokens are differentiated by what they read, one layer's gradients at a time.

The tokens so far stand in a buffer with room for those to come. These are written behind them, and attention reads the buffer
itself: no second copy of the cache is made. The backward pass gives the gradients of the earlier tokens away as it reaches a layer,
and keeps none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

# Takes a layer's number, 0 for keys or 1 for values, and their gradient `[B, H_kv, cached, D]`.
Receive = Callable[[int, int, Tensor], None]


@dataclass
class Differentiation:
    """What the layers of one pass share.

    anchor: a leaf that every stored state depends on, so that a backward pass reaches it whatever the model's weights ask for. receive:
    who takes the gradients now. newest: K and V of the layer that was updated last.
    """

    anchor: Tensor
    receive: Receive | None = None
    newest: tuple[Tensor, ...] = ()
    error: BaseException | None = None

    def give(self, layer: int, stream: int, gradient: Tensor) -> None:
        """Hand a gradient on; an error there is kept apart from those of the model's own backward pass."""
        if self.receive is None:
            return
        try:
            self.receive(layer, stream, gradient)
        except BaseException as error:
            self.error = error
            raise

    def pack(self, x: Tensor) -> Any:
        """What autograd keeps of a tensor: of repeated keys or values the ones that they repeat."""
        for states in self.newest:
            if repeats(x, states):
                return Repeated(states.detach(), x.shape[1] // states.shape[1])
        # an output that kept its own graph would keep itself
        return x.detach()


@dataclass(frozen=True)
class Repeated:
    """States `[B, H_kv, T, D]`, each head `times` times."""

    states: Tensor
    times: int

    def whole(self) -> Tensor:
        """As a tensor `[B, H_kv * times, T, D]`."""
        return self.states.repeat_interleave(self.times, dim=1)


def unpack(kept: Any) -> Tensor:
    """The tensor that autograd kept."""
    return kept.whole() if isinstance(kept, Repeated) else kept


def repeats(x: Tensor, states: Tensor) -> bool:
    """Whether `x` is `states` `[B, H_kv, T, D]` with each head several times."""
    if x.dim() != 4 or x.dtype != states.dtype or (x.shape[0], *x.shape[2:]) != (states.shape[0], *states.shape[2:]):
        return False
    heads = states.shape[1]
    if x.shape[1] <= heads or x.shape[1] % heads:
        return False
    alike = x.unflatten(1, (heads, -1))
    return torch.equal(alike, states[:, :, None].expand_as(alike))


class WrittenBehind(torch.autograd.Function):
    """A buffer of states with new ones at its end; the gradients of those before them are given away."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, new: Tensor, buffer: Tensor, layer: int, stream: int, shared: Differentiation
    ) -> Tensor:
        ctx.place, ctx.shared, ctx.cached = (layer, stream), shared, buffer.shape[2] - new.shape[2]
        buffer[:, :, ctx.cached :] = new
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        ctx.shared.give(*ctx.place, gradient[:, :, : ctx.cached])
        return gradient.new_zeros(()), gradient[:, :, ctx.cached :], None, None, None, None


class WholeLayer(DynamicLayer):
    """A dense layer that keeps every token, also where the model's mask hides those out of a window.

    After `expect_tokens`, its next update is one that gradients go through.
    """

    shared: Differentiation | None = None
    number = 0
    buffers: tuple[Tensor, ...] = ()

    def expect_tokens(self, number: int, tokens: int, shared: Differentiation) -> None:
        """Make room for `tokens` more."""
        self.number, self.shared, cached = number, shared, self.keys.shape[2]
        buffers = []
        for name in ("keys", "values"):
            states = getattr(self, name)
            buffer = states.new_empty(*states.shape[:2], cached + tokens, states.shape[3])
            buffer[:, :, :cached] = states
            setattr(self, name, buffer[:, :, :cached])
            buffers.append(buffer)
        self.buffers = tuple(buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the states `[B, H_kv, n, D]` of new tokens; those of all tokens."""
        if self.shared is None:
            return super().update(key_states, value_states, *args, **kwargs)
        shared, self.shared = self.shared, None
        self.keys, self.values = shared.newest = self.buffers
        key, value = (
            WrittenBehind.apply(shared.anchor, new, buffer, self.number, stream, shared)
            for stream, (new, buffer) in enumerate(zip((key_states, value_states), self.buffers, strict=True))
        )
        return key, value


class WholeIndexedLayer(WholeLayer, DynamicIndexedLayer):
    """The same with an indexer's keys beside it."""


class WholeHybridLayer(WholeLayer, LinearAttentionAndFullAttentionLayer):
    """The same with linear states beside it."""


def whole_cache(model: nn.Module) -> DynamicCache:
    """A dense cache whose layers with keys and values keep every token, and can be differentiated."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [whole_layer(layer) for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = WholeLayer
    return cache


def whole_layer(own: Any) -> Any:
    """What stands in the place of transformers' `own`; that itself where it is of another kind."""
    if type(own) in (DynamicLayer, DynamicSlidingWindowLayer):
        layer: WholeLayer = WholeLayer()
    elif type(own) is DynamicIndexedLayer:
        layer = WholeIndexedLayer()
    elif type(own) in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        layer = WholeHybridLayer(number_of_states=own.number_of_states)
    else:
        return own
    layer.is_sliding = own.is_sliding
    return layer
