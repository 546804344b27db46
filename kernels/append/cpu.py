"""`apack::append` on CPUs: addresses and strides for the compiled operation (kernels/csrc/append.h)."""

import torch
from torch import Tensor

from apack_compile.kernels.append.reference import append as reference
from apack_compile.kernels.encode.cpu import QUANTIZER
from apack_compile.kernels.native import COMPILED, DTYPES, INSTRUCTION_SET, NO_BASIS, Kept, turns_of
from apack_compile.kernels.structs import APPEND

NO_STREAM = (0, 0, 0, 0, 0, 1, *NO_BASIS)


def append(
    key: Tensor,
    value: Tensor,
    stores: list[Tensor],
    bases: list[Tensor],
    bands: list[int],
    cursor: Tensor,
    text_turns: Tensor | None = None,
    block: int = 0,
) -> None:
    """As the reference, in float32 inside; float64 and stores with gaps are the reference's.

    Raises IndexError when there is no slot left, MemoryError when there is no memory for scratch space.
    """
    tensors = (*stores, *bases)
    kept = getattr(cursor, "_apack_append", None)
    if kept is None or not kept.matches(tensors, bands):
        kept = Kept(tensors, bands, append_state(stores, bases, bands))
        cursor._apack_append = kept  # type: ignore[attr-defined]
    state = kept.state
    if state is None or key.dtype not in DTYPES or value.dtype not in DTYPES:
        return reference(key, value, stores, bases, bands, cursor, text_turns, block)
    (key_tail, value_tail), slots, capacity = state
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, new_tokens, key_dim = key.shape
    copies: list[Tensor] = []
    arguments = APPEND.pack(
        torch.get_num_threads(), batch, heads, new_tokens, slots, capacity, cursor.data_ptr(),
        *QUANTIZER,
        key.data_ptr(), DTYPES[key.dtype], *key.stride()[:3], key_dim, *key_tail,
        value.data_ptr(), DTYPES[value.dtype], *value.stride()[:3], value.shape[3], *value_tail,
        *turns_of(text_turns, block, copies),
    )  # fmt: skip
    status = COMPILED.apack_append(arguments, INSTRUCTION_SET)
    if status == 2:
        raise IndexError(
            f"append: {new_tokens} new tokens, but the cache has no free slot left; call cache.reserve first"
        )
    if status == 1:
        raise MemoryError("append: no memory for its scratch space")
    return None


def append_state(stores: list[Tensor], bases: list[Tensor], bands: list[int]) -> tuple | None:
    """Tail and text stream of K and V, slots of the tail, text slots; None where the compiled operation cannot write into them."""
    if not all(x.is_contiguous() for x in (*stores, *bases)) or any(x.dtype not in DTYPES for x in stores):
        return None
    sides = []
    for i, tail in enumerate(stores[:2]):
        stream = NO_STREAM
        if len(stores) > 2:
            codes, scale = stores[2 + 2 * i : 4 + 2 * i]
            where = (codes.data_ptr(), DTYPES[codes.dtype], *codes.stride()[:3], codes.shape[1])
            stream = (*where, *NO_BASIS)
            if codes.dtype == torch.uint8:
                mean, decoder, step = bases[3 * i : 3 * i + 3]
                basis = (mean.data_ptr(), decoder.data_ptr(), step.data_ptr(), DTYPES[mean.dtype], mean.shape[0])
                stream = (*where, scale.data_ptr() if scale.numel() else 0, *basis, *bands[4 * i : 4 * i + 4])
        sides.append((tail.data_ptr(), DTYPES[tail.dtype], *tail.stride()[:3], *stream))
    return sides, stores[0].shape[2], stores[2].shape[2] if len(stores) > 2 else 0
