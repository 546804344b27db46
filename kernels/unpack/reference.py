"""Specification of `apack::unpack` in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.cursor import HELD, stored_before, tail_positions
from apack_compile.kernels.format import decode
from apack_compile.kernels.heads import to_heads
from apack_compile.kernels.rotations import check_pairs, interleaved, rotated, rotations_of_slots
from apack_compile.kernels.state import PackedState, PackedStream


def unpack(
    key: Tensor,
    value: Tensor,
    state: list[Tensor],
    layout: Sequence[int],
    tokens: int,
    vision_importance: Tensor | None = None,
    text_importance: Tensor | None = None,
    tiers: Tensor | None = None,
    partial: int = 0,
    ema: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """K and V `[B, H_kv, tokens, D]` in `key`'s dtype, the newest tokens exact, zeros where no token is held.

    Every stored token with all its bands: the tiers say what `attend`, which takes this call's place, reads. Keys whose pairs are
    interleaved in the model, the new ones too, are held in halves, and are given back as the model has them. Raises ValueError for
    lists that are no state (kernels/state.py), and for more pairs than a key has.
    """
    held = PackedState.parse(state, layout)
    pairs = held.interleaved_pairs
    check_pairs(pairs, key.shape[-1])
    keys = [held.first.key, *(_decoded(s.key, key, s.rotations, held.block) for s in held.segments), held.tail.key]
    values = [held.first.value, *(_decoded(s.value, value) for s in held.segments), held.tail.value]
    out = _restore(key, keys, held, tokens)
    return interleaved(out, pairs) if pairs else out, _restore(value, values, held, tokens)


def _decoded(packed: PackedStream, new: Tensor, rotations: Tensor | None = None, block: int = 0) -> Tensor:
    """Heads `[B, H, N, D]` of one stream, in the dtype of the new ones."""
    dtype = new.dtype if rotations is None else torch.promote_types(new.dtype, torch.float32)
    x = to_heads(decode(packed.codes, packed.scale, packed.basis, packed.bands, dtype), new.shape[1])
    if rotations is not None:
        x = rotated(x, rotations_of_slots(rotations, block, torch.arange(x.shape[2], device=x.device))[:, None])
    return x.to(new.dtype)


def _restore(new: Tensor, segments: list[Tensor], held: PackedState, tokens: int) -> Tensor:
    """First, packed and tail tokens scattered to their positions, with the new ones laid over them."""
    cursor = held.cursor
    batch, heads, new_tokens, head_dim = new.shape
    out = new.new_zeros(batch, heads, tokens + 1, head_dim)
    stored = [p.expand(batch, -1) for p in (held.first_positions, *(s.positions for s in held.segments))]
    where = [torch.where(stored_before(p, cursor, new_tokens), p, tokens) for p in stored]
    ring = tail_positions(held.tail.slots, cursor)
    where.append(torch.where(ring < cursor[HELD] - new_tokens, ring, tokens).expand(batch, -1))
    for segment, position in zip(segments, where, strict=True):
        states = segment.to(out.dtype).expand(batch, -1, -1, -1)
        out.scatter_(2, position.long()[:, None, :, None].expand_as(states), states)
    newest = cursor[HELD] - new_tokens + torch.arange(new_tokens, device=new.device)
    return out[:, :, :tokens].index_copy(2, newest, new)
