"""`apack::pack` on CUDA: the kernels of `append`, whose tail here is empty, so that all tokens leave it at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.append import triton as append_triton
from apack_compile.kernels.format import StreamBasis, decode
from apack_compile.kernels.pack import reference
from apack_compile.kernels.pack.reference import empty_codes, grouped, lost_share
from apack_compile.kernels.state import Layout


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
    found = Layout.parse(layout)
    both = [StreamBasis(*bases[i : i + 3]) for i in (0, 3)]
    bands = found.bands[0]
    streams = [
        empty_codes(x, basis, b, groups, has_scale, slots)
        for x, basis, b, has_scale in zip((key, value), both, bands, scaled, strict=True)
    ]
    # position p of these tokens has slot p - cursor[2]
    cursor = torch.zeros(3, dtype=torch.int64, device=key.device)
    cursor[2] -= used
    tail = [x.new_empty((*x.shape[:2], 0, x.shape[3])) for x in (key, value)]
    append_triton.append(key, value, [cursor, *tail, *streams[0], *streams[1]], list(bases), layout)
    lost = []
    for i, (x, (codes, scale)) in enumerate(zip((key, value), streams, strict=True)):
        if not every or not bands[i].components:
            lost += [x.new_zeros((), dtype=torch.float32)] * (every > 0)
            continue
        places = torch.arange(used, used + x.shape[2], every, device=x.device)
        tokens = grouped(x[:, :, ::every], groups, bases[6] if found.block and i == 0 else None, found.block, places)
        stored = slice(used, used + x.shape[2], every)
        decoded = decode(codes[:, :, stored], scale[..., stored], both[i], bands[i])
        lost.append(lost_share(tokens, decoded, None if real is None else real[:, ::every]))
    return (*streams[0], *streams[1], torch.stack(lost) if lost else key.new_empty(0, dtype=torch.float32))
