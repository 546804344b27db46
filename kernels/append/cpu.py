"""`apack::append` on CPUs: addresses and strides for the compiled operation (kernels/csrc/append.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.addresses import append_addresses_of
from apack_compile.kernels.append.reference import append as reference
from apack_compile.kernels.encode.cpu import QUANTIZER
from apack_compile.kernels.native import COMPILED, DTYPES, INSTRUCTION_SET
from apack_compile.kernels.structs import APPEND


def append(
    key: Tensor,
    value: Tensor,
    stores: list[Tensor],
    bases: list[Tensor],
    layout: Sequence[int] = (),
) -> None:
    """As the reference, in float32 inside; float64 and stores with gaps are the reference's.

    Raises IndexError when there is no slot left, MemoryError when there is no memory for scratch space.
    """
    at = append_addresses_of(stores, bases, layout)
    if at is None or key.dtype not in DTYPES or value.dtype not in DTYPES:
        return reference(key, value, stores, bases, layout)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, new_tokens, key_dim = key.shape
    arguments = APPEND.pack(
        torch.get_num_threads(), batch, heads, new_tokens, at.tail_slots, at.capacity, at.cursor,
        *QUANTIZER,
        key.data_ptr(), DTYPES[key.dtype], *key.stride()[:3], key_dim, *at.key,
        value.data_ptr(), DTYPES[value.dtype], *value.stride()[:3], value.shape[3], *at.value,
        *at.rotations,
    )  # fmt: skip
    status = COMPILED.apack_append(arguments, INSTRUCTION_SET)
    if status == 2:
        raise IndexError(
            f"append: {new_tokens} new tokens, but the cache has no free slot left; call cache.reserve first"
        )
    if status == 1:
        raise MemoryError("append: no memory for its scratch space")
    return None
