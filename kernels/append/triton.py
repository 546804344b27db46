"""`apack::append` on CUDA, in Triton: two launches, and nothing waits for the device.

The first projects the tokens that the tail pushes out, and notes the cursor; the second writes their codes, puts the new tokens into the
tail, and moves the cursor. So no program reads what another one of its launch writes.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from apack_compile.kernels.append import reference
from apack_compile.kernels.append.triton_kernel import Dense, Side, Stream, project_kernel, write_kernel
from apack_compile.kernels.encode.triton import block_of
from apack_compile.kernels.format import Bands
from apack_compile.kernels.state import AppendState, PackedStream
from apack_compile.kernels.triton_rotations import pairs_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COLUMNS, CHANNELS = 32, 64


def append(
    key: Tensor,
    value: Tensor,
    stores: list[Tensor],
    bases: list[Tensor],
    layout: Sequence[int] = (),
) -> None:
    """As `reference.append`, which also serves float64 here; a token without a free slot is not written, where the CPU raises."""
    if key.dtype not in DTYPES:
        return reference.append(key, value, stores, bases, layout)
    state = AppendState.parse(stores, bases, layout)
    cursor, packed, rotations = state.cursor, (state.key, state.value), state.rotations
    batch, heads, new_tokens, _ = key.shape
    if new_tokens == 0:
        return None
    slots, groups, capacity = state.tail.slots, state.key.groups, state.key.codes.shape[2]
    coded = list(packed) if capacity else [None, None]
    streams = [_stream(stream, new_tokens) for stream in coded]
    rotations = None if rotations is None else rotations.contiguous()
    parts = zip((state.tail.key, state.tail.value), (key, value), streams, strict=True)
    sides = tuple(Side(_dense(tail), _dense(new), stream) for tail, new, stream in parts)
    bands = [Bands() if stream is None else stream.bands for stream in coded]
    kept = tuple(stream is not None and stream.as_is for stream in coded)
    fold = all(stream is None or stream.as_is or stream.basis.mean.shape[0] == 1 for stream in coded)
    rows = batch * new_tokens if fold else new_tokens
    row_tile = 16 if rows <= 16 else 32
    blocks = tuple(0 if s.coefficients is None else triton.cdiv(s.coefficients.shape[-1], COLUMNS) for s in streams)
    before = torch.empty_like(cursor)
    shapes = {"LAYOUTS": tuple(b.counts for b in bands), "KEPT": kept, "DIMS": (key.shape[3], value.shape[3])}
    shapes["PER"] = heads // groups
    with torch.cuda.device_of(key):
        project_kernel[(triton.cdiv(rows, row_tile), groups * (1 if fold else batch), max(1, sum(blocks)))](
            sides,
            rotations,
            0 if rotations is None else rotations.shape[1],
            cursor,
            before,
            batch,
            new_tokens,
            slots,
            groups,
            **shapes,
            BLOCKS=blocks,
            FOLD=fold,
            PAIRS=(pairs_of(rotations), 0),
            ANCHOR_SLOTS=state.block,
            PRECISION="ieee" if key.dtype == torch.float32 else "tf32x3",
            ROW_TILE=row_tile,
            COLUMNS=COLUMNS,
            CHANNELS=CHANNELS,
        )
        tokens_coded = new_tokens if any(blocks) else 0
        write_kernel[(tokens_coded * batch * groups + batch * heads + 1, 2)](
            sides,
            cursor,
            before,
            new_tokens,
            slots,
            heads,
            groups,
            capacity,
            tokens_coded,
            batch * groups,
            batch * heads,
            **shapes,
            BLOCK=max(map(block_of, bands)),
            CHANNELS=triton.next_power_of_2(max(key.shape[3], value.shape[3])),
        )
    return None


def _dense(x: Tensor) -> Dense:
    """Tokens for the kernels."""
    return Dense(x, *x.stride())


def _stream(packed: PackedStream | None, new_tokens: int) -> Stream:
    """A packed stream for the kernels, with scratch for its coefficients."""
    if packed is None:
        return Stream()
    batch, groups, _, columns = packed.codes.shape
    code_batch, code_group, code_token, _ = packed.codes.stride()
    scale, (scale_batch, scale_group, scale_token) = None, (0, 0, 0)
    if packed.scale.numel():
        scale, (scale_batch, scale_group, scale_token) = packed.scale, packed.scale.stride()
    mean = decoder = step = None
    next_batch = 0
    if not packed.as_is:
        mean, decoder, step = (tensor.contiguous() for tensor in packed.basis)
        columns, next_batch = packed.bands.components, 0 if packed.basis.mean.shape[0] == 1 else groups
    coefficients = torch.empty(batch, groups, new_tokens, columns, dtype=torch.float32, device=packed.codes.device)
    # fmt: off
    return Stream(
        packed.codes, code_batch, code_group, code_token, scale, scale_batch, scale_group, scale_token,
        mean, decoder, step, next_batch, coefficients,
    )
    # fmt: on
