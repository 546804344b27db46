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
from apack_compile.kernels.state import AppendState, DenseSegment, PackedStream
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
    packed = (state.key, state.value)
    if key.shape[2]:
        held = packed if state.key.codes.shape[2] else (None, None)
        code(key, value, state.tail, state.cursor, 0, held, state.key.groups, state.rotations, state.block)
    return None


def code(
    key: Tensor,
    value: Tensor,
    tail: DenseSegment | None,
    cursor: Tensor | None,
    used: int,
    packed: Sequence[PackedStream | None],
    groups: int,
    rotations: Tensor | None,
    block: int,
) -> None:
    """Write the codes of the tokens that `key` and `value` push out of a tail; without one, and a cursor, of all, from slot `used` on."""
    batch, heads, new_tokens, _ = key.shape
    slots = 0 if tail is None else tail.slots
    capacity = 0 if packed[0] is None else packed[0].codes.shape[2]
    # components that lie between projecting a token and writing its codes; without a tail, one that is kept as it is has none
    components = [0 if stream is None or (stream.as_is and tail is None) else _components(stream) for stream in packed]
    of_each = batch * groups * new_tokens
    size = of_each * sum(components)
    coefficients = torch.empty(size, dtype=torch.float32, device=key.device) if size else None
    scratch = ((coefficients, 0), (coefficients, of_each * components[0]))
    streams = [
        _stream(stream, *(part if count else (None, 0)))
        for stream, part, count in zip(packed, scratch, components, strict=True)
    ]
    rotations = None if rotations is None else rotations.contiguous()
    parts = zip((key, value) if tail is None else (tail.key, tail.value), (key, value), streams, strict=True)
    sides = tuple(Side(_dense(old), _dense(new), stream) for old, new, stream in parts)
    bands = [Bands() if stream is None else stream.bands for stream in packed]
    kept = tuple(stream is not None and stream.as_is for stream in packed)
    fold = all(stream is None or stream.as_is or stream.basis.mean.shape[0] == 1 for stream in packed)
    rows = batch * new_tokens if fold else new_tokens
    row_tile = 16 if rows <= 16 else 32
    blocks = tuple(triton.cdiv(count, COLUMNS) for count in components)
    before = None if cursor is None else torch.empty_like(cursor)
    shapes = {"LAYOUTS": tuple(b.counts for b in bands), "KEPT": kept, "DIMS": (key.shape[3], value.shape[3])}
    shapes["PER"] = heads // groups
    with torch.cuda.device_of(key):
        if any(blocks) or cursor is not None:
            project_kernel[(triton.cdiv(rows, row_tile), groups * (1 if fold else batch), max(1, sum(blocks)))](
                sides,
                rotations,
                0 if rotations is None else rotations.shape[1],
                cursor,
                before,
                used,
                batch,
                new_tokens,
                slots,
                groups,
                **shapes,
                BLOCKS=blocks,
                FOLD=fold,
                PAIRS=(pairs_of(rotations), 0),
                ANCHOR_SLOTS=block,
                PRECISION="ieee" if key.dtype == torch.float32 else "tf32x3",
                ROW_TILE=row_tile,
                COLUMNS=COLUMNS,
                CHANNELS=CHANNELS,
            )
        tokens_coded = new_tokens if capacity else 0
        write_kernel[(tokens_coded * batch * groups + (0 if cursor is None else batch * heads + 1), 2)](
            sides,
            cursor,
            before,
            used,
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


def _dense(x: Tensor) -> Dense:
    """Tokens for the kernels."""
    return Dense(x, *x.stride())


def _components(packed: PackedStream) -> int:
    """Numbers that a token of a stream is, before it is coded."""
    return packed.codes.shape[3] if packed.as_is else packed.bands.components


def _stream(packed: PackedStream | None, coefficients: Tensor | None, at: int) -> Stream:
    """A packed stream for the kernels, with scratch for its coefficients."""
    if packed is None:
        return Stream()
    code_batch, code_group, code_token, _ = packed.codes.stride()
    scale, (scale_batch, scale_group, scale_token) = None, (0, 0, 0)
    if packed.scale.numel():
        scale, (scale_batch, scale_group, scale_token) = packed.scale, packed.scale.stride()
    mean = decoder = step = None
    next_batch = 0
    if not packed.as_is:
        mean, decoder, step = (tensor.contiguous() for tensor in packed.basis)
        next_batch = 0 if packed.basis.mean.shape[0] == 1 else packed.groups
    # fmt: off
    return Stream(
        packed.codes, code_batch, code_group, code_token, scale, scale_batch, scale_group, scale_token,
        mean, decoder, step, next_batch, coefficients, at,
    )
    # fmt: on
