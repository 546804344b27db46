"""Attention of an eager prefill, seen where it happens: the importance of its tokens.

A cache with tiers needs the queries, which `Cache.update` does not get. So the keys of a prompt that it returns know their layer, and
see the scaled_dot_product_attention that is called with them. Nothing outlives those keys: however a forward pass ends, it leaves
nothing behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apack_compile.cache.stored_states import ARGUMENTS, ATTENTION
from apack_compile.plan.tiers import newest_attention, newest_rows

if TYPE_CHECKING:
    from apack_compile.cache.cache import CompactedCache
    from apack_compile.cache.layer import CompactedLayer

# What is done to keys on their way to an attention: heads repeated, dtype changed.
STILL_KEYS = frozenset(
    (
        Tensor.__getitem__,
        Tensor.contiguous,
        Tensor.expand,
        Tensor.repeat_interleave,
        torch.repeat_interleave,
        Tensor.reshape,
        Tensor.to,
        Tensor.type_as,
    )
)


@dataclass(frozen=True)
class Watch:
    """Who wants to see the attention of a chunk of so many tokens, and of which of its rows: the last real ones up to `newest`.

    padding: bool `[B, tokens]`, the padding among them; None for none.
    """

    cache: "CompactedCache"
    layer: "CompactedLayer"
    tokens: int
    newest: int
    padding: Tensor | None

    def attend(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The attention that is called with these arguments, without what was evicted; the layer gets the importance that it makes."""
        named: dict[str, Any] = {"attn_mask": None, "is_causal": False, "scale": None}
        named |= {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        query, key = named["query"], named["key"]
        scale = query.shape[-1] ** -0.5 if named["scale"] is None else named["scale"]
        mask = self._without_evicted(named)
        if mask is not None:
            out = ATTENTION(
                query, key, named["value"], attn_mask=mask, scale=scale, enable_gqa=named.get("enable_gqa", False)
            )
        else:
            out = ATTENTION(*args, **kwargs)
        # Heads may come as rows (grouped query), and keys repeated.
        query = query.reshape(query.shape[0], -1, self.tokens, query.shape[3])
        key = key[:, :: key.shape[1] // self.layer.num_heads]
        mask = named["attn_mask"] if mask is None else mask
        mask = mask if mask is None or mask.shape[2] <= self.tokens else mask[:, :, -self.tokens :]
        rule, padding = self.layer.tiers.rule, self.padding
        padding = None if padding is None or padding.shape[1] != query.shape[2] else padding
        rows = newest_rows(self.newest, rule.queries, len(query), padding, query.device)
        attention = newest_attention(query, key, mask, scale, rows)
        first = rows.masked_fill(rows < 0, self.tokens).amin(1)
        self.cache.settle(self.layer, rule.importance(attention, first + key.shape[2] - self.tokens))
        return out

    def _without_evicted(self, named: dict[str, Any]) -> Tensor | None:
        """The mask without evicted positions; None where none was evicted."""
        tiers = self.layer.tiers
        if not tiers.has_evicted:
            return None
        alive = tiers.alive(named["key"].shape[2])
        # padding has no slot either, and attends to itself
        alive[:, tiers.began :] = True
        mask, rows, columns = named["attn_mask"], named["query"].shape[2], named["key"].shape[2]
        alive = alive[:, None, None]
        if mask is None:
            causal = torch.ones(rows, columns, dtype=torch.bool, device=alive.device).tril(columns - rows)
            return alive & causal
        return mask & alive if mask.dtype == torch.bool else mask.masked_fill(~alive, float("-inf"))


class WatchedKeys(Tensor):
    """Keys `[B, H, T, D]` of a chunk, whose next attention is seen."""

    watch: Watch

    @staticmethod
    def of(keys: Tensor, watch: Watch) -> "WatchedKeys":
        """These keys, watched."""
        watched = keys.as_subclass(WatchedKeys)
        watched.watch = watch
        return watched

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        watch = next((x.watch for x in (*args, *kwargs.values()) if isinstance(x, WatchedKeys)), None)
        with torch._C.DisableTorchFunctionSubclass():
            if func is ATTENTION and watch is not None:
                return watch.attend(args, kwargs)
            out = func(*args, **kwargs)
            is_key = func in STILL_KEYS and watch is not None and out.shape[-2:] == args[0].shape[-2:]
            return WatchedKeys.of(out, watch) if is_key else out
