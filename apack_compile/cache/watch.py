"""Attention of an eager prefill, seen where it happens: the importance of its tokens.

A cache with tiers needs the queries, which `Cache.update` does not get. So the keys of a prompt that it returns know their layer, and
see the scaled_dot_product_attention that is called with them. Nothing outlives those keys: however a forward pass ends, it leaves
nothing behind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apack_compile.cache.token_index import Flags, there
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
    """Who wants to see the attention of a chunk of so many tokens, and of which of its rows."""

    cache: "CompactedCache"
    layer: "CompactedLayer"
    tokens: int
    rows: "Rows"

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
        if query.shape[2] != self.tokens:
            query = query.reshape(query.shape[0], -1, self.tokens, query.shape[3])
        repeats = key.shape[1] // self.layer.num_heads
        key = key if repeats == 1 else key[:, ::repeats]
        mask = named["attn_mask"] if mask is None else mask
        mask = mask if mask is None or mask.shape[2] <= self.tokens else mask[:, :, -self.tokens :]
        attention = newest_attention(query, key, mask, scale, self.rows)
        prompt = Prompt(attention, self.rows.oldest, key)
        self.cache.settle(self.layer, self.layer.tiers.rule.importance(prompt))
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
def newest_attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, rows: "Tensor | Rows") -> Tensor:
    """Head-mean attention `[B, R, T]`, float32, of the queries at `rows` `[B, R]` of `[B, H_q, n, D]` over keys `[B, H, T, D]`.

    mask: as for scaled_dot_product_attention, or None for causal. rows: -1 for none, whose attention is 0. Only these queries'
    attention matrix is built.
    """
    heads = query.shape[1]
    if isinstance(rows, Tensor):
        rows = Rows.of(rows.cpu().numpy(), query.shape[2], key.shape[2], query.device)
    chosen = rows.of_each(query).float() * scale
    # of three dimensions a product is one operation
    grouped = chosen.view(len(key) * key.shape[1], -1, chosen.shape[3])
    scores = torch.bmm(grouped, key.flatten(0, 1).float().mT).view(len(query), heads, rows.count, -1)
    hidden = rows.hidden if mask is None else rows.hidden_by(mask)
    if hidden is not None:
        is_flag = hidden.dtype == torch.bool
        scores = scores.masked_fill_(hidden, float("-inf")) if is_flag else scores + hidden.float()
    attention = scores.softmax(-1)
    if mask is not None:
        # of a row that sees nothing
        attention = attention.nan_to_num_(0.0)
    attention = attention.mean(1)
    return attention if rows.missing is None else attention.masked_fill_(rows.missing, 0.0)


@dataclass(frozen=True)
class Rows:
    """Queries whose attention is asked for, the same in all layers.

    index: int64 `[R]` where they are the same in all sequences, else `[B, 1, R, 1]`. hidden: bool `[B, 1, R, T]`, keys behind them,
    None for none. missing: bool `[B, R, 1]`, those that a sequence has not, None for none. oldest: position `[B]` of the first one.
    known: the newest mask, which layers share, and what it hides.
    """

    index: Tensor
    hidden: Tensor | None
    missing: Tensor | None
    oldest: Tensor
    known: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @staticmethod
    def of(rows: NDArray[np.int64], tokens: int, keys: int, device: torch.device) -> "Rows":
        """Rows `[B, R]`, -1 for none, of so many queries over so many keys, the queries' own the last of them."""
        index, before = rows.clip(0), keys - tokens
        hidden = np.arange(keys) > rows[:, None, :, None] + before
        first = np.where(rows < 0, tokens, rows).min(axis=1) + before
        return Rows(
            there(index[0] if (rows == rows[:1]).all() else index[:, None, :, None], device),
            there(hidden, device) if hidden.any() else None,
            there(rows[..., None] < 0, device) if (rows < 0).any() else None,
            there(first, device),
        )

    @property
    def count(self) -> int:
        """R."""
        return self.index.numel() if self.index.dim() == 1 else self.index.shape[2]

    def of_each(self, x: Tensor) -> Tensor:
        """Those rows `[B, H, R, D]` of `[B, H, n, D]`."""
        if self.index.dim() == 1:
            return x.index_select(2, self.index)
        x = x if len(x) == len(self.index) else x.expand(len(self.index), -1, -1, -1)
        return x.gather(2, self.index.expand(-1, x.shape[1], -1, x.shape[3]))

    def hidden_by(self, mask: Tensor) -> Tensor:
        """Bool, which keys a mask hides from these rows, or numbers to add to scores, as the mask has either."""
        if not self.known or self.known[0][0] is not mask:
            seen = self.of_each(mask) if mask.shape[2] > 1 else mask
            self.known[:] = [(mask, ~seen if mask.dtype == torch.bool else seen)]
        return self.known[0][1]


@dataclass
class AskedRows:
    """The newest real queries of a chunk, up to row `newest`, made once for all layers; padding: bool `[B, n]`."""

    newest: int
    padding: Flags
    rows: Rows | None = None

    def over(self, layer: "CompactedLayer", key: Tensor) -> Rows:
        """As many as a layer's rule asks for, over keys `[B, H_kv, T, D]`."""
        if self.rows is None:
            wanted = newest_rows(self.newest, layer.tiers.rule.queries, self.padding)
            self.rows = Rows.of(wanted, self.padding.shape[1], key.shape[2], key.device)
        return self.rows


def newest_rows(newest: int, queries: int, padding: Flags) -> NDArray[np.int64]:
    """Rows `[B, R]` of the newest real tokens up to row `newest`, in falling order; -1 where there are fewer, 0 < R <= queries.

    padding: bool `[B, tokens]`; a sequence of padding alone has the row `newest`.
    """
    real = np.where(padding[:, : newest + 1], -1, np.arange(newest + 1))
    rows = -np.sort(-real, axis=1)[:, :queries]
    rows[:, 0] = np.where(rows[:, 0] < 0, newest, rows[:, 0])
    return rows
