"""`apack::unpack` on CPUs: addresses and strides for the compiled operation (kernels/csrc/unpack.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.addresses import addresses_of, with_rows
from apack_compile.kernels.cursor import HELD
from apack_compile.kernels.native import COMPILED, DTYPES, INSTRUCTION_SET
from apack_compile.kernels.rotations import check_pairs
from apack_compile.kernels.state import PackedState
from apack_compile.kernels.structs import UNPACK
from apack_compile.kernels.unpack.reference import unpack as reference


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
    """As the reference, in float32 inside; states in float64 get the reference.

    Raises ValueError for more pairs than a key has, IndexError when more than `tokens` are held, MemoryError when there is no memory for
    scratch space.
    """
    if key.dtype not in DTYPES or value.dtype not in DTYPES:
        return reference(key, value, state, layout, tokens)
    at = addresses_of(state, layout)
    key, value = with_rows(key), with_rows(value)
    batch, heads, new_tokens, key_dim = key.shape
    check_pairs(at.interleaved_pairs, key_dim)
    keys = key.new_empty((batch, heads, tokens, key_dim))
    values = value.new_empty((batch, heads, tokens, value.shape[3]))
    arguments = UNPACK.pack(
        torch.get_num_threads(), batch, heads, new_tokens, tokens, at.cursor,
        key.data_ptr(), DTYPES[key.dtype], *key.stride()[:3], key_dim, keys.data_ptr(),
        value.data_ptr(), DTYPES[value.dtype], *value.stride()[:3], value.shape[3], values.data_ptr(),
        *at.rotations, at.interleaved_pairs,
    )  # fmt: skip
    status = COMPILED.apack_unpack(arguments, at.state, INSTRUCTION_SET)
    if status == 2:
        held = int(PackedState.parse(state, layout).cursor[HELD])
        raise IndexError(f"unpack: tokens={tokens} must be at least the number of tokens held, {held}")
    if status == 1:
        raise MemoryError("unpack: no memory for its scratch space")
    return keys, values
