"""`apack::unpack` on CPUs: addresses and strides for the compiled operation (kernels/csrc/unpack.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.native import COMPILED, DTYPES, INSTRUCTION_SET, turns_of_segments
from apack_compile.kernels.state import packed_state, with_rows
from apack_compile.kernels.structs import UNPACK
from apack_compile.kernels.turns import check_pairs
from apack_compile.kernels.unpack.reference import unpack as reference


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
    """As the reference, in float32 inside; states in float64 get the reference.

    Raises ValueError for more pairs than a key has, IndexError when more than `tokens` are held, MemoryError when there is no memory for
    scratch space.
    """
    if key.dtype not in DTYPES or value.dtype not in DTYPES:
        return reference(
            key, value, dense, codes, bases, bands, positions, cursor, tokens,
            turns=turns, block=block, interleaved_pairs=interleaved_pairs,
        )  # fmt: skip
    state, _copies = packed_state(dense, codes, bases, bands, positions, cursor)
    key, value = with_rows(key), with_rows(value)
    batch, heads, new_tokens, key_dim = key.shape
    check_pairs(interleaved_pairs, key_dim)
    keys = key.new_empty((batch, heads, tokens, key_dim))
    values = value.new_empty((batch, heads, tokens, value.shape[3]))
    copies: list[Tensor] = []
    arguments = UNPACK.pack(
        torch.get_num_threads(), batch, heads, new_tokens, tokens, cursor.data_ptr(),
        key.data_ptr(), DTYPES[key.dtype], *key.stride()[:3], key_dim, keys.data_ptr(),
        value.data_ptr(), DTYPES[value.dtype], *value.stride()[:3], value.shape[3], values.data_ptr(),
        *turns_of_segments(turns, len(positions) - 1, block, copies), interleaved_pairs,
    )  # fmt: skip
    status = COMPILED.apack_unpack(arguments, state, INSTRUCTION_SET)
    if status == 2:
        raise IndexError(f"unpack: tokens={tokens} must be at least the number of tokens held, {int(cursor[0])}")
    if status == 1:
        raise MemoryError("unpack: no memory for its scratch space")
    return keys, values
