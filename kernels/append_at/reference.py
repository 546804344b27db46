"""Specification of `apack::append_at` in plain torch, around an implementation of `apack::append`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apack_compile.kernels.cursor import HELD
from apack_compile.kernels.state import AppendState

Append = Callable[..., None]


def append_at(
    append: Append,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    first: list[Tensor],
    stores: list[Tensor],
    bases: list[Tensor],
    layout: Sequence[int] = (),
) -> None:
    """Append `[B, H_kv, n, D]` tokens at positions `index` `[n]`, in place; position 0 begins a new sequence.

    first: K and V of the first segment, whose slot p holds position p. All tokens go through the tail into the text slots, slot p
    for position p; a first token counts as held by `first` from when it leaves the tail (`stored_before`). On a CPU
    raises ValueError for positions that do not follow one another or neither start at 0 nor follow the tokens held, IndexError for
    positions past the last slot; other devices assert the same without waiting for it.
    """
    state, new_tokens = AppendState.parse(stores, bases, layout), key.shape[2]
    if index.shape != (new_tokens,):
        raise ValueError(f"index: shape {tuple(index.shape)} must be ({new_tokens},), a position for each new token")
    if new_tokens == 0:
        return
    _check(index, state)
    start = index[0]
    state.cursor.mul_(start != 0)
    if key.device.type != "cpu" or int(start) < first[0].shape[2]:
        for kept, states in zip(first, (key, value), strict=True):
            source = torch.arange(kept.shape[2], device=index.device) - start
            is_new = (source >= 0) & (source < new_tokens)
            new = states.index_select(2, source.clamp(0, new_tokens - 1)).to(kept.dtype)
            kept.copy_(torch.where(is_new[:, None], new, kept))
    append(key, value, stores, bases, layout)


def _check(index: Tensor, state: AppendState) -> None:
    """Raise, or assert on the device, where tokens would not follow those held."""
    new_tokens, slots = len(index), state.tail.slots + state.key.codes.shape[2]
    expected = torch.arange(new_tokens, device=index.device) + index[0]
    if index.device.type != "cpu":
        follows = (index[0] == 0) | (index[0] == state.cursor[HELD])
        right = (index == expected).all() & follows & (index[-1] < slots)
        torch._assert_async(right, "append_at: positions do not follow the tokens held, or pass the last slot")
        return
    start, held = int(index[0]), int(state.cursor[HELD])
    if new_tokens > 1 and not torch.equal(index.to(expected.dtype), expected):
        raise ValueError(f"index: positions {index.tolist()} must follow one another")
    if start not in (0, held):
        raise ValueError(
            f"index: starts at {start}, must be {held}, the tokens held, or 0, which begins a new sequence"
        )
    if start + new_tokens > slots:
        raise IndexError(f"index: {new_tokens} tokens from position {start} on pass the cache's {slots} slots")
