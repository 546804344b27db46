"""Specification of `apack::pack` in torch, around what encodes tokens on a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import Bands, StreamBasis, decode
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.rotations import rotated, rotations_of_slots
from apack_compile.kernels.state import Layout

# Tokens at once: what lies between a token and its codes is no multiple of the prompt.
AT_ONCE = 2048


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
    """Codes `[B, G, slots, bytes]` and token scales `[B, G, slots]` of K, then V, of tokens `[B, H_kv, n, D]` in slots from `used` on.

    bases, layout: as `append` is given them. groups: head groups. scaled: whether K, and V, have token scales. What lies before slot
    `used` is for the caller to fill, what lies behind the tokens is zero. The last tensor is float32 `[2]`: the share of the variance of
    every `every`-th token that coding K, and V, loses; empty where `every` is 0, as it is where rows have bases of their own. real: bool
    `[B, n]`, tokens that count there; None for all.
    """
    found = Layout.parse(layout)
    rotations = bases[6] if found.block else None
    out: list[Tensor] = []
    lost: list[Tensor] = []
    for i, (x, bands) in enumerate(zip((key, value), found.bands[0], strict=True)):
        basis, by = StreamBasis(*bases[3 * i : 3 * i + 3]), rotations if i == 0 else None
        places = torch.arange(used, used + x.shape[2], device=x.device)
        codes, scale = empty_codes(x, basis, bands, groups, scaled[i], slots)
        for start in range(0, x.shape[2], AT_ONCE):
            part = slice(start, min(start + AT_ONCE, x.shape[2]))
            tokens = grouped(x[:, :, part], groups, by, found.block, places[part])
            coded, scales = encode(tokens, basis, bands, scaled[i])
            codes[:, :, used + part.start : used + part.stop] = coded
            if scale.numel():
                scale[:, :, used + part.start : used + part.stop] = scales
        out += [codes, scale]
        if every and bands.components:
            stored = slice(used, used + x.shape[2], every)
            decoded = decode(codes[:, :, stored], scale[..., stored], basis, bands)
            sample = grouped(x[:, :, ::every], groups, by, found.block, places[::every])
            lost.append(lost_share(sample, decoded, None if real is None else real[:, ::every]))
        elif every:
            lost.append(x.new_zeros((), dtype=torch.float32))
    return (*out, torch.stack(lost) if lost else key.new_empty(0, dtype=torch.float32))  # type: ignore[return-value]


def empty_codes(
    x: Tensor, basis: StreamBasis, bands: Bands, groups: int, scaled: bool, slots: int
) -> tuple[Tensor, Tensor]:
    """Zeros for codes and token scales of states `[B, H_kv, n, D]`; tokens that are kept as they are have their own dtype."""
    batch, heads, _, head_dim = x.shape
    if basis.mean.numel() == 0:
        codes = x.new_zeros((batch, groups, slots, heads // groups * head_dim))
    else:
        codes = x.new_zeros((batch, groups, slots, bands.token_bytes), dtype=torch.uint8)
    has_scale = scaled and bands.components > 0
    return codes, x.new_zeros((batch, groups, slots) if has_scale else 0, dtype=torch.float16)


def grouped(x: Tensor, groups: int, rotations: Tensor | None, block: int, slots: Tensor) -> Tensor:
    """Head groups `[B, G, n, W_g]` of tokens `[B, H_kv, n, D]` for `slots` `[n]`, rotated back as their blocks are."""
    if rotations is None:
        return to_groups(x, groups)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return to_groups(rotated(x, rotations_of_slots(rotations, block, slots)[:, None], back=True), groups)


def lost_share(x: Tensor, decoded: Tensor, real: Tensor | None) -> Tensor:
    """Share of the variance of tokens `[B, G, N, W_g]` that is not in `decoded`, 0-d; `real` `[B, N]` leaves out empty ones."""
    x, error = x.float(), (decoded - x).square()
    if real is None:
        variance = (x - x.mean((0, 2), keepdim=True)).square().sum()
    else:
        weight = real[:, None, :, None].float()
        mean = (x * weight).sum((0, 2), keepdim=True) / weight.sum().clamp_min(1)
        variance, error = ((x - mean).square() * weight).sum(), error * weight
    return error.sum() / variance.clamp_min(torch.finfo(torch.float32).tiny)
