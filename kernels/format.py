"""Banded transform coding: a token becomes a few coefficients, each stored with the bits its variance deserves.

A token x of width W (all KV heads of a head group) is stored as `c = (x - mean) @ decoder.T`, the leading components in
bands of 16, 8, 4 and 2 bits. Integer bands are mid-rise uniform levels with one step per component,
`c ~ scale * step * (level - (2**bits - 1) / 2)`, clipped at the outermost level; the 16-bit band is float16 `c / (scale * step)`.
`scale` is 1, or one float16 per token. Bytes of a token: the 16-bit components, then the 8-, 4- and 2-bit ones, each band padded
to a whole byte; inside a byte the first component has the lowest bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WIDTHS = (16, 8, 4, 2)
# MSE-optimal step of a uniform quantizer for a unit Gaussian (Max, 1960, table II); 1 for the float16 band.
GAUSSIAN_STEP = {16: 1.0, 8: 0.0308, 4: 0.335, 2: 0.996}
# Relative squared error at that step; 0 bits is a dropped component.
GAUSSIAN_DISTORTION = {16: 1e-7, 8: 1e-4, 4: 0.0115, 2: 0.119, 0: 1.0}
# A token's scale is taken this much higher than its coefficients ask for: on tokens unlike the calibration's, clipping costs more than a
# coarser step (docs/notes/quality.md).
HEADROOM = {16: 1.0, 8: 1.4, 4: 1.2, 2: 1.1}
FLOAT16_MAX = 65504.0
MIN_TOKEN_SCALE = 2.0**-14


@dataclass(frozen=True)
class Bands:
    """Number of components stored in 16, 8, 4 and 2 bits, widest first."""

    counts: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def components(self) -> int:
        """Components kept (the rank)."""
        return sum(self.counts)

    def at_most(self, components: int) -> "Bands":
        """The leading components of these bands."""
        left, counts = components, []
        for count in self.counts:
            counts.append(min(count, left))
            left -= counts[-1]
        n16, n8, n4, n2 = counts
        return Bands((n16, n8, n4, n2))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, without its scale."""
        return sum(band_bytes(count, bits) for count, bits in zip(self.counts, WIDTHS, strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each component, in order."""
        return tuple(bits for count, bits in zip(self.counts, WIDTHS, strict=True) for _ in range(count))


class StreamBasis(NamedTuple):
    """What decodes one stream: mean `[S, G, W_g]`, decoder rows `[S, G, r, W_g]`, step `[S, G, r]`; S is 1 or the batch.

    An empty mean stands for the identity: the stream is stored as it is.
    """

    mean: Tensor
    decoder: Tensor
    step: Tensor


def band_bytes(count: int, bits: int) -> int:
    """Bytes that `count` components of `bits` bits take, rounded up to a whole byte."""
    return -(-count * bits // 8)


def pack_levels(levels: Tensor, bits: int) -> Tensor:
    """Integer levels `[..., n]` as bytes `[..., ceil(n * bits / 8)]`, uint8."""
    per_byte = 8 // bits
    padding = -levels.shape[-1] % per_byte
    levels = torch.nn.functional.pad(levels.to(torch.uint8), (0, padding))
    if per_byte == 1:
        return levels
    levels = levels.unflatten(-1, (-1, per_byte))
    return sum((levels[..., i] << (bits * i) for i in range(1, per_byte)), start=levels[..., 0])  # type: ignore[return-value]


def unpack_levels(packed: Tensor, bits: int, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The first `count` levels of packed bytes, `[..., count]` in `dtype`."""
    if bits == 8:
        return packed.to(dtype)
    # A table of what each byte holds: one lookup a byte is several times faster than shifts and masks.
    byte = torch.arange(256, device=packed.device)
    shifts = torch.arange(0, 8, bits, device=packed.device)
    table = ((byte[:, None] >> shifts) & ((1 << bits) - 1)).to(dtype)
    return torch.nn.functional.embedding(packed.int(), table).flatten(-2)[..., :count]


def centered_levels(codes: Tensor, bands: Bands, dtype: torch.dtype) -> Tensor:
    """Codes `[..., bytes]` as coefficients in units of their step `[..., r]`, in `dtype`."""
    parts, start = [], 0
    for count, bits in zip(bands.counts, WIDTHS, strict=True):
        if count == 0:
            continue
        packed = codes[..., start : start + band_bytes(count, bits)]
        start += packed.shape[-1]
        if bits == 16:
            # a copy, because the strides of a single token's slice may be odd
            parts.append(packed.clone(memory_format=torch.contiguous_format).view(torch.float16).to(dtype))
        else:
            parts.append(unpack_levels(packed, bits, count, dtype).sub_((2**bits - 1) / 2))
    return torch.cat(parts, dim=-1) if parts else codes.new_zeros((*codes.shape[:-1], 0), dtype=dtype)


def project(x: Tensor, basis: StreamBasis) -> Tensor:
    """Coefficients `[B, G, N, r]` of tokens `[B, G, N, W_g]`, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) - basis.mean.to(dtype)[:, :, None]) @ basis.decoder.to(dtype).mT


def token_scales(coefficients: Tensor, step: Tensor, bands: Bands) -> Tensor:
    """One float16 scale per token: root mean square of its coefficients over their deviation, with some headroom."""
    steps = [GAUSSIAN_STEP[bits] * HEADROOM[bits] for bits in bands.widths]
    unit = torch.tensor(steps, device=step.device, dtype=coefficients.dtype)
    normalized = coefficients * (unit / step.to(coefficients.dtype))[:, :, None]
    return normalized.square().mean(-1).sqrt().clamp(MIN_TOKEN_SCALE, FLOAT16_MAX).to(torch.float16)


def quantize(coefficients: Tensor, step: Tensor, bands: Bands, token_scale: bool) -> tuple[Tensor, Tensor]:
    """Codes and token scales, as `encode` returns them, of coefficients `[B, G, N, r]`."""
    step = step.to(coefficients.dtype)
    scale = coefficients.new_empty(0, dtype=torch.float16)
    levels = coefficients / step[:, :, None]
    if token_scale and bands.components:
        scale = token_scales(coefficients, step, bands)
        levels = levels / scale.to(levels.dtype)[..., None]
    parts = []
    for band, bits in zip(levels.split(bands.counts, dim=-1), WIDTHS, strict=True):
        if band.shape[-1] == 0:
            continue
        if bits == 16:
            half = band.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
            parts.append(half.contiguous().view(torch.uint8))
        else:
            top = 2**bits - 1
            parts.append(pack_levels((band + top / 2).round().clamp(0, top), bits))
    codes = torch.cat(parts, -1) if parts else levels.new_empty((*levels.shape[:-1], 0), dtype=torch.uint8)
    return codes, scale


def coefficients_of(codes: Tensor, scale: Tensor, basis: StreamBasis, bands: Bands, dtype: torch.dtype) -> Tensor:
    """Stored coefficients `[B, G, N, r]` in `dtype`."""
    coefficients = centered_levels(codes, bands, dtype) * basis.step.to(dtype)[:, :, None]
    return coefficients.mul_(scale.to(dtype)[..., None]) if scale.numel() else coefficients


def decode(
    codes: Tensor, scale: Tensor, basis: StreamBasis, bands: Bands, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Tokens `[B, G, N, W_g]` in `dtype`, computed in float32 or better."""
    if basis.mean.numel() == 0:
        return codes.to(dtype)
    work = torch.promote_types(dtype, torch.float32)
    coefficients = coefficients_of(codes, scale, basis, bands, work)
    return (coefficients @ basis.decoder.to(work) + basis.mean.to(work)[:, :, None]).to(dtype)
