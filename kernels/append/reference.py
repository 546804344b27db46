"""Specification of `apack::append` in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.cursor import HELD, ORIGIN, PACKED
from apack_compile.kernels.encode import encode
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.rotations import rotated, rotations_of_slots
from apack_compile.kernels.state import AppendState, PackedStream


def append(
    key: Tensor,
    value: Tensor,
    stores: list[Tensor],
    bases: list[Tensor],
    layout: Sequence[int] = (),
) -> None:
    """Append `[B, H_kv, n, D]` tokens in place; docs/format.md has the lists.

    Tokens enter the tail, a ring. Those it pushes out, oldest first, are encoded into the text slots, keys rotated back by
    the rotation of their block of slots. Raises IndexError when there is no slot left for one of them.
    """
    state = AppendState.parse(stores, bases, layout)
    cursor, tails, packed = state.cursor, (state.tail.key, state.tail.value), (state.key, state.value)
    new_tokens = key.shape[2]
    slots = state.tail.slots
    held, start = cursor[HELD].clone(), cursor[PACKED].clone()
    new_start = torch.maximum(start, held + new_tokens - slots)
    any_pushed = new_start > start
    # A fixed number of writes whatever is pushed out: the spare ones repeat the last token, or rewrite what is there.
    pushed = torch.minimum(start + torch.arange(new_tokens, device=key.device), new_start - 1)
    text_slot = pushed - cursor[ORIGIN]
    capacity = state.key.codes.shape[2]
    if key.device.type == "cpu" and bool(any_pushed & (text_slot[-1:] >= capacity).any()):
        raise IndexError(
            f"append: {new_tokens} new tokens, but the cache has no free slot left; call cache.reserve first"
        )
    for i, (states, tail) in enumerate(zip((key, value), tails, strict=True)):
        if capacity and new_tokens:
            leaving = _leaving(states, tail, pushed, held)
            if i == 0 and state.rotations is not None:
                target = text_slot.clamp(0, capacity - 1)
                exact = leaving.to(torch.promote_types(leaving.dtype, torch.float32))
                leaving = rotated(exact, rotations_of_slots(state.rotations, state.block, target)[:, None], back=True)
            _push_out(leaving, packed[i], any_pushed, text_slot)
    kept = min(new_tokens, slots)
    if kept:
        ring_slot = (held + torch.arange(new_tokens - kept, new_tokens, device=key.device)) % slots
        for states, tail in zip((key, value), tails, strict=True):
            tail.index_copy_(2, ring_slot, states[:, :, new_tokens - kept :].to(tail.dtype))
    cursor[PACKED] = new_start
    cursor[HELD] = held + new_tokens


def _leaving(states: Tensor, tail: Tensor, pushed: Tensor, held: Tensor) -> Tensor:
    """The tokens at positions `pushed`, from the tail or from the new ones."""
    slots = tail.shape[2]
    source = torch.where(pushed < held, pushed % max(slots, 1), slots + pushed - held)
    source = source.clamp(0, slots + states.shape[2] - 1)
    return torch.cat([tail.to(states.dtype), states], dim=2).index_select(2, source)


def _push_out(leaving: Tensor, stream: PackedStream, any_pushed: Tensor, text_slot: Tensor) -> None:
    """Encode tokens into their text slots."""
    codes, scale = encode(to_groups(leaving, stream.groups), stream.basis, stream.bands, stream.scale.numel() > 0)
    target = text_slot.clamp(0, stream.codes.shape[2] - 1)
    for store, new in ((stream.codes, codes), (stream.scale, scale)):
        if store.numel():
            store.index_copy_(2, target, torch.where(any_pushed, new.to(store.dtype), store.index_select(2, target)))
