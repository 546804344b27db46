"""`apack::attend` and `apack::attend_tiers` on CPUs: addresses and strides for the compiled operation (kernels/csrc/attend.h)."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.attend.reference import attend as reference
from apack_compile.kernels.native import DTYPES, INSTRUCTION_SET, LIBRARY

# kernels/csrc/arguments.h
SOURCE = "16q"
SEGMENT = f"3q2d{SOURCE}{SOURCE}"
ARGUMENTS = struct.Struct(f"=13qd12q{SEGMENT * 5}")
NO_SOURCE = (0, 0, 0, 0, 0, 1) + (0,) * 10
NO_BASIS = (0,) * 10
MAX_HEAD_DIM = 2048


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
    held: list[Tensor] = []  # copies that must outlive the call

    def rowwise(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if (dtype is not None and x.dtype != dtype) or x.stride(-1) != 1:
            x = x.to(dtype).contiguous()
            held.append(x)
        return x

    def plain(x: Tensor) -> int:
        if not x.is_contiguous():
            x = x.contiguous()
            held.append(x)
        return x.data_ptr()

    def as_they_are(x: Tensor) -> tuple:
        if x.stride(3) != 1 or x.dtype not in DTYPES:
            x = x.float().contiguous()
            held.append(x)
        return (x.data_ptr(), DTYPES[x.dtype], *x.stride()[:3], x.shape[1], *NO_BASIS)

    def stream(i: int) -> tuple:
        x = codes[2 * i]
        if x.dtype != torch.uint8:
            return as_they_are(x)
        token_scale, (mean, decoder, step) = codes[2 * i + 1], bases[3 * i : 3 * i + 3]
        if x.stride(3) != 1:
            x = x.contiguous()
            held.append(x)
        return (
            x.data_ptr(), 3, *x.stride()[:3], x.shape[1],
            plain(token_scale) if token_scale.numel() else 0,
            plain(mean), plain(decoder), plain(step), DTYPES[mean.dtype], mean.shape[0], *bands[4 * i : 4 * i + 4],
        )  # fmt: skip

    def segment(i: int) -> tuple:
        x = codes[4 * i - 4]
        return x.shape[2], plain(positions[i])

    out = query.new_empty((batch, query_heads, rows, value_dim))
    query = rowwise(query)
    masked = (0, 0, 0, 0, 0, 0)
    if mask is not None:
        mask = rowwise(mask, torch.bool if mask.dtype == torch.bool else torch.float32)
        strides = (s if n > 1 else 0 for n, s in zip(mask.shape[:3], mask.stride(), strict=False))
        masked = (mask.data_ptr(), int(mask.dtype == torch.bool), *strides, mask.shape[3])
    biased = (0, 0)
    if bias is not None:
        bias = rowwise(bias, torch.float32).contiguous()
        biased = (bias.data_ptr(), bias.shape[1])
    keep_add = ema or (0.0,) * 4
    importance = [
        0 if x is None or x.numel() == 0 else plain(x) for x in (vision_importance, text_importance)
    ]
    words = [
        torch.get_num_threads(), batch, heads, query_heads, rows, new_tokens, head_dim, value_dim,
        query.data_ptr(), DTYPES[query.dtype], *query.stride()[:3],
        head_dim**-0.5 if scale is None else scale,
        out.data_ptr(), cursor.data_ptr(), *masked, *biased,
        0 if tiers is None else plain(tiers), partial,
        dense[0].shape[2], plain(positions[0]), 0, 0.0, 0.0, *as_they_are(dense[0]), *as_they_are(dense[1]),
        *segment(1), importance[0], *keep_add[:2], *stream(0), *stream(1),
        *segment(2), importance[1], *keep_add[2:4], *stream(2), *stream(3),
        dense[2].shape[2], 0, 0, 0.0, 0.0, *as_they_are(dense[2]), *as_they_are(dense[3]),
        new_tokens, 0, 0, 0.0, 0.0, *as_they_are(key), *as_they_are(value),
    ]  # fmt: skip
    if LIBRARY.apack_attend(ARGUMENTS.pack(*words), INSTRUCTION_SET):
        raise MemoryError("attend: no memory for its scratch space")
    return out
