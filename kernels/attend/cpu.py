"""`apack::attend` and `apack::attend_tiers` on CPUs: addresses and strides for the compiled operation (kernels/csrc/attend.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.addresses import addresses_of, with_rows
from apack_compile.kernels.attend.reference import attend as reference
from apack_compile.kernels.native import COMPILED, DTYPES, INSTRUCTION_SET
from apack_compile.kernels.state import check_tiers
from apack_compile.kernels.structs import ATTEND

# a head's row must fit into a tile, kernels/csrc/attend.h
MAX_HEAD_DIM = 2_048


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    state: list[Tensor] | None = None,
    layout: Sequence[int] = (),
    scale: float | None = None,
    vision_importance: Tensor | None = None,
    text_importance: Tensor | None = None,
    tiers: Tensor | None = None,
    partial: int = 0,
    ema: Sequence[float] | None = None,
    instructions: int = INSTRUCTION_SET,
) -> Tensor:
    """As the reference, in float32 inside, or in 16-bit integers where the processor multiplies those faster; queries in float64, heads
    wider than 2,048 and relative keys that are kept as they are get the reference. instructions: index into INSTRUCTION_SETS.

    Raises ValueError for importance of another shape or not contiguous, MemoryError when there is no memory for scratch space.
    """
    batch, heads, new_tokens, head_dim = key.shape
    _, query_heads, rows, _ = query.shape
    value_dim = value.shape[3]
    at = None
    if query.dtype != torch.float64 and head_dim <= MAX_HEAD_DIM and value_dim <= MAX_HEAD_DIM:
        at = addresses_of(state, layout)
    if at is None or at.rotates_as_is:
        return reference(
            query, key, value, mask, state, layout, scale, vision_importance, text_importance, tiers, partial, ema
        )
    kinds = query.dtype, key.dtype, value.dtype
    strides = query.stride(), key.stride(), value.stride()
    if not (
        strides[0][3] == strides[1][3] == strides[2][3] == 1
        and kinds[0] in DTYPES
        and kinds[1] in DTYPES
        and kinds[2] in DTYPES
    ):
        query, key, value = with_rows(query), with_rows(key), with_rows(value)
        kinds = query.dtype, key.dtype, value.dtype
        strides = query.stride(), key.stride(), value.stride()
    out = query.new_empty((batch, query_heads, rows, value_dim))
    masked: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        mask = (mask if is_bool else mask.float()).contiguous()
        steps = (s if n > 1 else 0 for n, s in zip(mask.shape[:3], mask.stride()[:3], strict=True))
        masked = (mask.data_ptr(), is_bool, *steps, mask.shape[3])
    importance: tuple[float, ...] = (0, 0.0, 0.0, 0, 0.0, 0.0)
    if tiers is not None:
        check_tiers(at.kinds, at.slots, batch, vision_importance, text_importance)
        tiers = tiers.contiguous()
        importance = (written(vision_importance), *ema[:2], written(text_importance), *ema[2:])
    arguments = ATTEND.pack(
        torch.get_num_threads(), batch, heads, query_heads, rows, new_tokens, head_dim, value_dim,
        query.data_ptr(), DTYPES[kinds[0]], *strides[0][:3],
        head_dim**-0.5 if scale is None else scale,
        out.data_ptr(), at.cursor, *masked, 0 if tiers is None else tiers.data_ptr(), partial, *importance,
        key.data_ptr(), value.data_ptr(), DTYPES[kinds[1]], *strides[1][:3], DTYPES[kinds[2]], *strides[2][:3],
        *at.rotations,
    )  # fmt: skip
    if COMPILED.apack_attend(arguments, at.state, instructions):
        raise MemoryError("attend: no memory for its scratch space")
    return out


def written(importance: Tensor | None) -> int:
    """Address of importance `[B, slots]`, 0 where nothing needs it; raises ValueError where rows do not follow one another."""
    if importance is None or importance.numel() == 0:
        return 0
    if not importance.is_contiguous():
        raise ValueError(f"importance: strides {importance.stride()} must be those of a contiguous tensor")
    return importance.data_ptr()
