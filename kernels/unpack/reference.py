"""Specification of `apack::unpack` in plain torch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apack_compile.kernels.format import decode
from apack_compile.kernels.layout import (
    HELD,
    check_segments,
    packed_streams,
    stored_before,
    tail_positions,
    to_heads,
)
from apack_compile.kernels.turns import check_pairs, interleaved, turned, turns_of_slots


def unpack(
    key: Tensor,
    value: Tensor,
    dense: list[Tensor],
    codes: list[Tensor],
    bases: list[Tensor],
    bands: list[int],
    positions: list[Tensor],
    cursor: Tensor,
    tokens: int,
    vision_importance: Tensor | None = None,
    text_importance: Tensor | None = None,
    tiers: Tensor | None = None,
    partial: int = 0,
    ema: Sequence[float] | None = None,
    turns: list[Tensor] | None = None,
    block: int = 0,
    interleaved_pairs: int = 0,
) -> tuple[Tensor, Tensor]:
    """K and V `[B, H_kv, tokens, D]` in `key`'s dtype, the newest tokens exact, zeros where no token is held.

    Every stored token with all its bands: the tiers say what `attend`, which takes this call's place, reads. turns: of each packed
    segment float32 `[B, blocks, 2, P]`, by which the stored keys of each `block` of slots were turned back; none for keys stored as
    they came. interleaved_pairs: keys, the new ones too, are held with components i and i + interleaved_pairs of a head where the model
    has 2 i and 2 i + 1, and are given back as the model has them. Raises ValueError for lists that are not those of one to three packed
    segments, and for more pairs than a key has.
    """
    check_segments(codes, bases, bands, positions, turns or ())
    check_pairs(interleaved_pairs, key.shape[-1])
    keys = list(_decoded(0, key, dense, codes, bases, bands, turns or (), block))
    values = list(_decoded(1, value, dense, codes, bases, bands, (), block))
    out = _restore(key, keys, positions, cursor, tokens)
    if interleaved_pairs:
        out = interleaved(out, interleaved_pairs)
    return out, _restore(value, values, positions, cursor, tokens)


def _decoded(
    stream: int,
    new: Tensor,
    dense: list[Tensor],
    codes: list[Tensor],
    bases: list[Tensor],
    bands: list[int],
    turns: Sequence[Tensor],
    block: int,
) -> Iterator[Tensor]:
    """Decoded segments `[B, H, N, D]` of one stream: first, the packed ones, tail."""
    yield dense[stream].to(new.dtype)
    packed_segments = packed_streams(codes, bases, bands)[stream::2]
    for packed, by in zip(packed_segments, turns or (None,) * len(packed_segments), strict=True):
        dtype = new.dtype if by is None else torch.promote_types(new.dtype, torch.float32)
        x = to_heads(decode(packed.codes, packed.scale, packed.basis, packed.bands, dtype), new.shape[1])
        if by is not None:
            x = turned(x, turns_of_slots(by, block, torch.arange(x.shape[2], device=x.device))[:, None])
        yield x.to(new.dtype)
    yield dense[2 + stream].to(new.dtype)


def _restore(new: Tensor, segments: list[Tensor], positions: list[Tensor], cursor: Tensor, tokens: int) -> Tensor:
    """Segments scattered to their positions, with the new tokens laid over them."""
    batch, heads, new_tokens, head_dim = new.shape
    out = new.new_zeros(batch, heads, tokens + 1, head_dim)
    where = [torch.where(stored_before(p, cursor, new_tokens), p, tokens) for p in positions]
    ring = tail_positions(segments[-1].shape[2], cursor)
    where.append(torch.where(ring < cursor[HELD] - new_tokens, ring, tokens).expand(batch, -1))
    for segment, position in zip(segments, where, strict=True):
        index = position.long()[:, None, :, None].expand_as(segment)
        out.scatter_(2, index, segment)
    newest = cursor[HELD] - new_tokens + torch.arange(new_tokens, device=new.device)
    return out[:, :, :tokens].index_copy(2, newest, new)
