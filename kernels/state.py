"""A layer's tensors as `State` of kernels/csrc/arguments.h, for the compiled operations that read it."""

import torch
from torch import Tensor

from apack_compile.kernels.layout import check_segments
from apack_compile.kernels.native import DTYPES, NO_BASIS, Kept
from apack_compile.kernels.structs import MAX_PACKED, SEGMENT

NO_SEGMENT = SEGMENT.pack(*((0, 0) + ((0,) * 5 + (1,) + NO_BASIS) * 2))


def with_rows(x: Tensor) -> Tensor:
    """The same values with rows that are contiguous, in a dtype that the compiled operation reads."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x if x.dtype in DTYPES else x.float()


def packed_state(
    dense: list[Tensor],
    codes: list[Tensor],
    bases: list[Tensor],
    bands: list[int],
    positions: list[Tensor],
    cursor: Tensor,
) -> tuple[bytes, object]:
    """`State` of kernels/csrc/arguments.h, and what keeps its addresses valid.

    A layer's tensors stay the same for many steps, so its state is kept with its cursor as long as they are the very same ones.
    """
    tensors = (*dense, *codes, *bases, *positions)
    kept = getattr(cursor, "_apack_state", None)
    if kept is not None and kept.matches(tensors, bands):
        return kept.state, kept
    check_segments(codes, bases, bands, positions)
    copies: list[Tensor] = []
    segments = [dense_segment(dense[0], dense[1], positions[0], copies)]
    for i, where in enumerate(positions[1:]):
        keys, values = (packed_source(codes, bases, bands, j, copies) for j in (2 * i, 2 * i + 1))
        segments.append(SEGMENT.pack(codes[4 * i].shape[2], plain(where, copies).data_ptr(), *keys, *values))
    segments += [NO_SEGMENT] * (1 + MAX_PACKED - len(positions))
    segments.append(dense_segment(dense[2], dense[3], None, copies))
    state = b"".join(segments)
    if not copies:
        cursor._apack_state = Kept(tensors, bands, state)  # type: ignore[attr-defined]
    return state, (tensors, copies)


def plain(x: Tensor, copies: list[Tensor]) -> Tensor:
    """A contiguous tensor; a copy is noted, because it must outlive the call and cannot serve another one."""
    if not x.is_contiguous():
        x = x.contiguous()
        copies.append(x)
    return x


def dense_segment(key: Tensor, value: Tensor, positions: Tensor | None, copies: list[Tensor]) -> bytes:
    """Segment of heads as they are, `[B, H_kv, slots, D]` each."""
    where = 0 if positions is None else plain(positions, copies).data_ptr()
    return SEGMENT.pack(key.shape[2], where, *as_is_source(key, copies), *as_is_source(value, copies))


def as_is_source(x: Tensor, copies: list[Tensor]) -> tuple[int, ...]:
    """Source of tokens as they are: `[B, G, slots, W_g]`."""
    readable = with_rows(x)
    if readable is not x:
        copies.append(readable)
    return (readable.data_ptr(), DTYPES[readable.dtype], *readable.stride()[:3], x.shape[1], *NO_BASIS)


def packed_source(
    codes: list[Tensor], bases: list[Tensor], bands: list[int], stream: int, copies: list[Tensor]
) -> tuple[int, ...]:
    """Source of one stream of the flat lists."""
    x, token_scale = codes[2 * stream : 2 * stream + 2]
    if x.dtype != torch.uint8:
        return as_is_source(x, copies)
    mean, decoder, step = (plain(t, copies) for t in bases[3 * stream : 3 * stream + 3])
    x = plain(x, copies)
    scale = plain(token_scale, copies).data_ptr() if token_scale.numel() else 0
    pointers = (mean.data_ptr(), decoder.data_ptr(), step.data_ptr())
    return (
        x.data_ptr(), DTYPES[x.dtype], *x.stride()[:3], x.shape[1],
        scale, *pointers, DTYPES[mean.dtype], mean.shape[0], *bands[4 * stream : 4 * stream + 4],
    )  # fmt: skip
