"""`apack::pack` on CUDA: the kernels of `append`, without a tail, so that all tokens are coded; two more for what is lost."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from apack_compile.kernels.append import triton as append_triton
from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.kernels.pack import reference
from apack_compile.kernels.pack.reference import empty_codes
from apack_compile.kernels.pack.triton_kernel import (
    CHANNELS,
    OTHER_SUMS,
    ROWS,
    SUM_CHANNELS,
    SUM_ROWS,
    UNITS,
    Coded,
    lost_kernel,
    share_kernel,
)
from apack_compile.kernels.state import Layout, PackedStream
from apack_compile.kernels.triton_rotations import pairs_of


def pack(
    key: Tensor,
    value: Tensor,
    bases: Sequence[Tensor],
    layout: Sequence[int],
    groups: int,
    scaled: Sequence[bool],
    used: int,
    slots: int,
    every: int,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference, which also serves float64."""
    if key.dtype not in append_triton.DTYPES:
        return reference.pack(key, value, bases, layout, groups, scaled, used, slots, every, real)
    found, both = Layout.parse(layout), [StreamBasis(*bases[i : i + 3]) for i in (0, 3)]
    bands = found.bands[0]
    streams = [
        empty_codes(x, basis, b, groups, has_scale, slots)
        for x, basis, b, has_scale in zip((key, value), both, bands, scaled, strict=True)
    ]
    rotations = bases[6].contiguous() if found.block else None
    packed = [PackedStream(*stream, basis, b) for stream, basis, b in zip(streams, both, bands, strict=True)]
    append_triton.code(key, value, None, None, used, packed, groups, rotations, found.block)
    if not every:
        return (*streams[0], *streams[1], key.new_empty(0, dtype=torch.float32))
    coded = [_coded(x, *stream, basis, groups) for x, stream, basis in zip((key, value), streams, both, strict=True)]
    lost = _lost(coded, bands, rotations, found.block, groups, used, slots, every, real)
    return (*streams[0], *streams[1], lost)


def _coded(x: Tensor, codes: Tensor, scale: Tensor, basis: StreamBasis, groups: int) -> Coded:
    """A stream for the kernel."""
    batch, head, token, channel = x.stride()
    if basis.mean.numel() == 0:
        return Coded(x, batch, head, token, channel)
    next_batch = 0 if basis.mean.shape[0] == 1 else groups
    mean, decoder, step = (part.contiguous() for part in basis)
    scales = scale if scale.numel() else None
    return Coded(x, batch, head, token, channel, codes, scales, mean, decoder, step, next_batch)


def _lost(
    coded: Sequence[Coded],
    bands: Sequence[Bands],
    rotations: Tensor | None,
    block: int,
    groups: int,
    used: int,
    slots: int,
    every: int,
    real: Tensor | None,
) -> Tensor:
    """Share of the variance of every `every`-th token that coding loses, of K and V, with bases that all rows share."""
    x = coded[0].tokens
    batch, heads, tokens, _ = x.shape
    samples, dims = -(-tokens // every), [stream.tokens.shape[3] for stream in coded]
    per, tiles, widest = heads // groups, triton.cdiv(samples, ROWS), heads // groups * max(dims)
    sums = torch.empty(2, tiles, batch * groups, widest + OTHER_SUMS.value, dtype=torch.float32, device=x.device)
    lost = sums.new_empty(2)
    is_coded = tuple(stream.codes is not None and b.components > 0 for stream, b in zip(coded, bands, strict=True))
    of_stream = sums.numel() // 2
    with torch.cuda.device_of(x):
        lost_kernel[(tiles, batch * groups, 2)](
            tuple(coded),
            rotations,
            0 if rotations is None else rotations.shape[1],
            None if real is None else real.contiguous(),
            used,
            every,
            samples,
            tokens,
            slots,
            groups,
            sums,
            of_stream,
            widest,
            LAYOUTS=tuple(b.counts for b in bands),
            CODED=is_coded,
            DIMS=tuple(dims),
            PER=per,
            PAIRS=(pairs_of(rotations), 0),
            ANCHOR_SLOTS=max(block, 1),
            ROWS=ROWS,
            CHANNELS=CHANNELS,
            UNITS=UNITS,
        )
        widths = tuple(per * dim for dim in dims)
        share_kernel[(2,)](
            sums, lost, tiles, batch, groups, of_stream, widest, is_coded, widths, SUM_ROWS, SUM_CHANNELS, num_warps=8
        )
    return lost
