"""Attention of an eager prefill, seen where it happens: the importance of its tokens.

A cache with tiers needs the queries, which `Cache.update` does not get. So the keys of a prompt that it returns know their layer, and
see the scaled_dot_product_attention that is called with them. Nothing outlives those keys: however a forward pass ends, it leaves
nothing behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from apack_compile.kernels.autocast import without_autocast
from apack_compile.models.attention_call import ATTENTION, named_arguments
from apack_compile.plan.tiers import Prompt

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
        named = named_arguments(args, kwargs)
        query, key = named["query"], named["key"]
        scale = query.shape[-1] ** -0.5 if named["scale"] is None else named["scale"]
        mask = self._without_evicted(named)
        if mask is not None:
            out = ATTENTION(query, key, named["value"], attn_mask=mask, scale=scale, enable_gqa=named["enable_gqa"])
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
        prompt = Prompt(attention, first + key.shape[2] - self.tokens, key)
        self.cache.settle(self.layer, rule.importance(prompt))
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


class Watcher(Protocol):
    """Who answers an attention over keys that are watched."""

    def attend(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The attention that is called with these arguments."""


class WatchedKeys(Tensor):
    """Keys `[B, H, T, D]` of a chunk, whose next attention is seen."""

    watch: Watcher

    @staticmethod
    def of(keys: Tensor, watch: Watcher) -> "WatchedKeys":
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


@torch.compiler.disable
@without_autocast
def newest_attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, rows: Tensor) -> Tensor:
    """Head-mean attention `[B, R, T]`, float32, of the queries at `rows` `[B, R]` of `[B, H_q, n, D]` over keys `[B, H, T, D]`.

    mask: as for scaled_dot_product_attention, or None for causal. rows: -1 for none, whose attention is 0. Only these queries'
    attention matrix is built.
    """
    batch, heads, tokens, head_dim = query.shape
    at = rows.clamp_min(0)[:, None, :, None]
    chosen = query.gather(2, at.expand(batch, heads, -1, head_dim)).float() * scale
    grouped = chosen.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ key.float().mT).reshape(batch, heads, rows.shape[1], -1)
    columns = torch.arange(key.shape[2], device=key.device)
    if mask is None:
        scores = scores.masked_fill((columns > rows[..., None] + key.shape[2] - tokens)[:, None], float("-inf"))
    else:
        whole = mask.expand(batch, -1, tokens, -1)
        at_rows = whole.gather(2, at.expand(batch, whole.shape[1], -1, whole.shape[3]))
        hidden = ~at_rows if mask.dtype == torch.bool else None
        scores = scores + at_rows.float() if hidden is None else scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0).mean(1).masked_fill(rows[..., None] < 0, 0.0)


def newest_rows(newest: int, queries: int, batch: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Rows `[B, R]` of the newest real tokens up to row `newest`, in falling order; -1 where there are fewer, 0 < R <= queries.

    padding: bool `[B, tokens]`; a sequence of padding alone has the row `newest`.
    """
    columns = torch.arange(newest + 1, device=device).expand(batch, -1)
    real = columns if padding is None else columns.masked_fill(padding[:, : newest + 1].to(device), -1)
    rows = real.topk(min(queries, newest + 1), dim=1).values
    return torch.cat([rows[:, :1].masked_fill(rows[:, :1] < 0, newest), rows[:, 1:]], 1)
