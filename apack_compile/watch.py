"""Attention of an eager prefill, seen where it happens: the importance of its tokens.

A cache with tiers needs the queries, which `Cache.update` does not get. A prefill calls scaled_dot_product_attention, and this mode
sees the call. Only such caches are watched.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apack_compile.cache import CompactedCache
from apack_compile.layer import CompactedLayer
from apack_compile.stored_states import ARGUMENTS, ATTENTION
from apack_compile.tiers import newest_attention


class AttentionWatch(TorchFunctionMode):
    """Connects each attention to the layer that was updated last."""

    def __init__(self, cache: CompactedCache) -> None:
        super().__init__()
        self.cache = cache
        cache.last_update = None
        self.padding = cache.incoming_padding

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = kwargs or {}
        updated = self.cache.last_update
        if func is not ATTENTION or updated is None:
            return func(*args, **given)
        self.cache.last_update = None
        named: dict[str, Any] = {"attn_mask": None, "is_causal": False, "scale": None}
        named |= {**dict(zip(ARGUMENTS, args, strict=False)), **given}
        query, key = named["query"], named["key"]
        scale = query.shape[-1] ** -0.5 if named["scale"] is None else named["scale"]
        layer, tokens = updated
        mask = self._without_evicted(layer, named)
        if mask is not None:
            out = func(
                query, key, named["value"], attn_mask=mask, scale=scale, enable_gqa=named.get("enable_gqa", False)
            )
        else:
            out = func(*args, **given)
        # Heads may come as rows (grouped query), and keys repeated.
        query = query.reshape(query.shape[0], -1, tokens, query.shape[3])
        key = key[:, :: key.shape[1] // layer.num_heads]
        mask = named["attn_mask"] if mask is None else mask
        mask = mask if mask is None or mask.shape[2] <= tokens else mask[:, :, -tokens:]
        self.cache.settle(layer, newest_attention(query, key, mask, scale, self._newest(query)))
        return out

    def _newest(self, query: Tensor) -> Tensor:
        """Row `[B]` of each sequence's last real token."""
        rows = query.shape[2]
        if self.padding is None or self.padding.shape[1] != rows:
            return torch.full((query.shape[0],), rows - 1, device=query.device)
        return (rows - 1 - (~self.padding).flip(1).to(torch.uint8).argmax(1)).to(query.device)

    def _without_evicted(self, layer: CompactedLayer, named: dict[str, Any]) -> Tensor | None:
        """The mask without evicted positions; None where none was evicted."""
        if not layer.tiers.has_evicted:
            return None
        alive = layer.tiers.alive(named["key"].shape[2])
        # padding has no slot either, and attends to itself
        alive[:, layer.tiers.began :] = True
        mask, rows, columns = named["attn_mask"], named["query"].shape[2], named["key"].shape[2]
        alive = alive[:, None, None]
        if mask is None:
            causal = torch.ones(rows, columns, dtype=torch.bool, device=alive.device).tril(columns - rows)
            return alive & causal
        return mask & alive if mask.dtype == torch.bool else mask.masked_fill(~alive, float("-inf"))


def start_watching(cache: CompactedCache, model: nn.Module) -> None:
    """See the attentions of the model's forward pass that begins; stored states are for those of "sdpa", others are written otherwise."""
    stop_watching(cache)
    cache.index.is_watched = model.config.get_text_config(decoder=True)._attn_implementation == "sdpa"
    if cache.may_have_tiers:
        cache.watch = AttentionWatch(cache)
        cache.watch.__enter__()


def stop_watching(cache: CompactedCache) -> None:
    """The forward pass has ended, or another began without an end."""
    watch, cache.watch, cache.index.is_watched = cache.watch, None, False
    if watch is not None:
        watch.__exit__(None, None, None)
