"""`apack::pack` on CUDA: the kernels of `append`, whose tail here is empty, so that all tokens leave it; one more for what is lost."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from apack_compile.kernels.append import triton as append_triton
from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.kernels.pack import reference
from apack_compile.kernels.pack.reference import empty_codes
from apack_compile.kernels.pack.triton_kernel import CHANNELS, ROWS, UNITS, Coded, lost_kernel
from apack_compile.kernels.state import Layout
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
    # position p of these tokens has slot p - cursor[2]
    cursor = torch.zeros(3, dtype=torch.int64, device=key.device)
    if used:
        cursor[2].sub_(used)
    tail = [x.new_empty((*x.shape[:2], 0, x.shape[3])) for x in (key, value)]
    append_triton.append(key, value, [cursor, *tail, *streams[0], *streams[1]], list(bases), layout)
    if not every:
        return (*streams[0], *streams[1], key.new_empty(0, dtype=torch.float32))
    rotations = bases[6].contiguous() if found.block else None
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
    per, all_rows, widest = heads // groups, batch * groups * samples, heads // groups * max(dims)
    errors = torch.zeros(2, all_rows, dtype=torch.float32, device=x.device)
    centered = torch.zeros(2, batch, groups, samples, widest, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        lost_kernel[(triton.cdiv(samples, ROWS), batch * groups, 2)](
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
            errors,
            centered,
            all_rows,
            widest,
            LAYOUTS=tuple(b.counts for b in bands),
            CODED=tuple(stream.codes is not None and b.components > 0 for stream, b in zip(coded, bands, strict=True)),
            DIMS=tuple(dims),
            PER=per,
            PAIRS=(pairs_of(rotations), 0),
            ANCHOR_SLOTS=max(block, 1),
            ROWS=ROWS,
            CHANNELS=CHANNELS,
            UNITS=UNITS,
        )
    count = batch * samples if real is None else real[:, ::every].sum().clamp_min(1)
    total = torch.linalg.vector_norm(centered.sum((1, 3)), dim=(1, 2)).square()
    variance = torch.linalg.vector_norm(centered, dim=(1, 2, 3, 4)).square() - total / count
    return errors.sum(1) / variance.clamp_min(torch.finfo(torch.float32).tiny)
