"""`apack::attend` and `apack::attend_tiers` on CPUs: addresses and strides for the compiled operation (kernels/csrc/attend.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.attend.reference import attend as reference
from apack_compile.kernels.native import ATTEND, COMPILED, DTYPES, INSTRUCTION_SET, NO_BASIS, SEGMENT, Kept

NO_SEGMENT = SEGMENT.pack(*((0, 0) + ((0,) * 5 + (1,) + NO_BASIS) * 2))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dense: list[Tensor],
    codes: list[Tensor],
    bases: list[Tensor],
    bands: list[int],
    positions: list[Tensor],
    cursor: Tensor,
    scale: float | None,
    vision_importance: Tensor | None = None,
    text_importance: Tensor | None = None,
    tiers: Tensor | None = None,
    partial: int = 0,
    ema: Sequence[float] | None = None,
) -> Tensor:
    """As the reference, in float32 inside; queries in float64 are the reference's.

    Raises MemoryError when there is none for its scratch space.
    """
    if query.dtype == torch.float64:
        return reference(
            query, key, value, mask, bias, dense, codes, bases, bands, positions, cursor, scale,
            vision_importance, text_importance, tiers, partial, ema,
        )  # fmt: skip
    batch, heads, new_tokens, head_dim = key.shape
    _, query_heads, rows, _ = query.shape
    value_dim = value.shape[3]
    state, _copies = packed_state(dense, codes, bases, bands, positions, cursor)
    query, key, value = with_rows(query), with_rows(key), with_rows(value)
    out = query.new_empty((batch, query_heads, rows, value_dim))
    masked = (0, 0, 0, 0, 0, 0)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        mask = (mask if is_bool else mask.float()).contiguous()
        shape, strides = mask.shape, mask.stride()
        over_batch, over_heads, over_rows = (s if n > 1 else 0 for n, s in zip(shape[:3], strides[:3], strict=True))
        masked = (mask.data_ptr(), is_bool, over_batch, over_heads, over_rows, shape[3])
    biased = (0, 0)
    if bias is not None:
        bias = bias.float().contiguous()
        biased = (bias.data_ptr(), bias.shape[1])
    importance = (0, 0.0, 0.0, 0, 0.0, 0.0)
    if tiers is not None:
        tiers = tiers.contiguous()
        vision, text = (x.data_ptr() if x is not None and x.numel() else 0 for x in (vision_importance, text_importance))
        importance = (vision, *ema[:2], text, *ema[2:])
    arguments = ATTEND.pack(
        torch.get_num_threads(), batch, heads, query_heads, rows, new_tokens, head_dim, value_dim,
        query.data_ptr(), DTYPES[query.dtype], *query.stride()[:3],
        head_dim**-0.5 if scale is None else scale,
        out.data_ptr(), cursor.data_ptr(), *masked, *biased, 0 if tiers is None else tiers.data_ptr(), partial, *importance,
        key.data_ptr(), value.data_ptr(), DTYPES[key.dtype], *key.stride()[:3], DTYPES[value.dtype], *value.stride()[:3],
    )  # fmt: skip
    if COMPILED.apack_attend(arguments, state, INSTRUCTION_SET):
        raise MemoryError("attend: no memory for its scratch space")
    return out


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
    copies: list[Tensor] = []
    segments = [dense_segment(dense[0], dense[1], positions[0], copies)]
    for i in range(2):
        if 4 * i < len(codes):
            keys, values = (packed_source(codes, bases, bands, j, copies) for j in (2 * i, 2 * i + 1))
            where = plain(positions[1 + i], copies).data_ptr()
            segments.append(SEGMENT.pack(codes[4 * i].shape[2], where, *keys, *values))
        else:
            segments.append(NO_SEGMENT)
    segments.append(dense_segment(dense[2], dense[3], None, copies))
    state = b"".join(segments)
    if not copies:
        cursor._apack_state = Kept(tensors, tuple(bands), state)  # type: ignore[attr-defined]
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
