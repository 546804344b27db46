"""Banded transform coding: a token becomes a few coefficients, each stored with the bits its variance deserves.

A token x of width W (all KV heads of a head group) is stored as `c = (x - mean) @ decoder.T`, the leading components in
the bands of `BANDS`, in order. Integer bands are mid-rise uniform levels with one step per component,
`c ~ scale * step * (level - (2**bits - 1) / 2)`, clipped at the outermost level; the 16-bit band is float16 `c / (scale * step)`.
`scale` is 1, or one float16 per token. Bytes of a token: the bands in order, each padded to whole units, the shortest runs of components
that fill whole bytes; inside a unit the first component has the lowest bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Components of one width. step: MSE-optimal one of a uniform quantizer for a unit Gaussian (Max, 1960, table II); 1 for float16.

    distortion: relative squared error at that step. headroom: a token's scale is taken this much higher than its coefficients ask for:
    on tokens unlike the calibration's, clipping costs more than a coarser step (docs/notes/quality.md). unpack_operations: integer
    operations that make a number of a code: a float16 needs none, a whole byte is placed, a part of one is also masked.
    """

    bits: int
    step: float
    distortion: float
    headroom: float
    unpack_operations: int

    @property
    def is_float(self) -> bool:
        """Whether components are float16 numbers, not levels."""
        return self.bits == 16

    @property
    def top(self) -> int:
        """Highest level."""
        return 2**self.bits - 1

    @property
    def unit_step(self) -> float:
        """Deviations of a component that its step is, at a token scale of 1."""
        return self.step * self.headroom


# What a new row touches: docs/contributing.md, "Add a band".
BANDS = (
    Band(16, step=1.0, distortion=1e-7, headroom=1.0, unpack_operations=0),
    Band(8, step=0.0308, distortion=1e-4, headroom=1.4, unpack_operations=1),
    Band(4, step=0.335, distortion=0.0115, headroom=1.2, unpack_operations=2),
    Band(2, step=0.996, distortion=0.119, headroom=1.1, unpack_operations=2),
)
WIDTHS = tuple(band.bits for band in BANDS)
FLOAT16_MAX = 65504.0
MIN_TOKEN_SCALE = 2.0**-14


@dataclass(frozen=True)
class Bands:
    """Number of components in each band, in the order of `BANDS`."""

    counts: tuple[int, ...] = (0,) * len(BANDS)

    @classmethod
    def of(cls, components: Mapping[int, int]) -> "Bands":
        """Bands of so many components by bits."""
        return cls(tuple(components.get(bits, 0) for bits in WIDTHS))

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
        return Bands(tuple(counts))

    @property
    def parts(self) -> tuple[tuple[int, Band], ...]:
        """Components of each band, and the band."""
        return tuple(zip(self.counts, BANDS, strict=True))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's codes, without its scale."""
        return sum(band_bytes(count, band.bits) for count, band in self.parts)

    @property
    def each(self) -> tuple[Band, ...]:
        """The band of each component, in order."""
        return tuple(band for count, band in self.parts for _ in range(count))

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each component, in order."""
        return tuple(band.bits for band in self.each)


class StreamBasis(NamedTuple):
    """What decodes one stream: mean `[S, G, W_g]`, decoder rows `[S, G, r, W_g]`, step `[S, G, r]`; S is 1 or the batch.

    An empty mean stands for the identity: the stream is stored as it is.
    """

    mean: Tensor
    decoder: Tensor
    step: Tensor


def unit_of(bits: int) -> tuple[int, int]:
    """Components and bytes of the shortest run of components that fills whole bytes."""
    components = 8 // math.gcd(bits, 8)
    return components, components * bits // 8


def band_bytes(count: int, bits: int) -> int:
    """Bytes that `count` components of `bits` bits take, rounded up to a whole unit."""
    components, size = unit_of(bits)
    return -(-count // components) * size


def pack_levels(levels: Tensor, bits: int) -> Tensor:
    """Integer levels `[..., n]` as bytes `[..., band_bytes(n, bits)]`, uint8."""
    components, size = unit_of(bits)
    levels = levels.to(torch.uint8 if size == 1 else torch.int64)
    levels = torch.nn.functional.pad(levels, (0, -levels.shape[-1] % components)).unflatten(-1, (-1, components))
    unit = levels[..., 0]
    for i in range(1, components):
        unit = unit | levels[..., i] << (bits * i)
    if size == 1:
        return unit
    return torch.stack([unit >> (8 * i) & 255 for i in range(size)], -1).flatten(-2).to(torch.uint8)


def unpack_levels(packed: Tensor, bits: int, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The first `count` levels of packed bytes, `[..., count]` in `dtype`."""
    components, size = unit_of(bits)
    if bits == 8:
        return packed.to(dtype)
    shifts = bits * torch.arange(components, device=packed.device)
    if size > 1:
        of_bytes = 8 * torch.arange(size, device=packed.device)
        unit = (packed.long().unflatten(-1, (-1, size)) << of_bytes).sum(-1)
        return ((unit[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count].to(dtype)
    # A table of what each byte holds: one lookup a byte is several times faster than shifts and masks.
    byte = torch.arange(256, device=packed.device)
    table = ((byte[:, None] >> shifts) & ((1 << bits) - 1)).to(dtype)
    return torch.nn.functional.embedding(packed.int(), table).flatten(-2)[..., :count]


def centered_levels(codes: Tensor, bands: Bands, dtype: torch.dtype) -> Tensor:
    """Codes `[..., bytes]` as coefficients in units of their step `[..., r]`, in `dtype`."""
    parts, start = [], 0
    for count, band in bands.parts:
        if count == 0:
            continue
        packed = codes[..., start : start + band_bytes(count, band.bits)]
        start += packed.shape[-1]
        if band.is_float:
            # a copy, because the strides of a single token's slice may be odd
            parts.append(packed.clone(memory_format=torch.contiguous_format).view(torch.float16).to(dtype))
        else:
            parts.append(unpack_levels(packed, band.bits, count, dtype).sub_(band.top / 2))
    return torch.cat(parts, dim=-1) if parts else codes.new_zeros((*codes.shape[:-1], 0), dtype=dtype)


def project(x: Tensor, basis: StreamBasis) -> Tensor:
    """Coefficients `[B, G, N, r]` of tokens `[B, G, N, W_g]`, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) - basis.mean.to(dtype)[:, :, None]) @ basis.decoder.to(dtype).mT


def token_scales(coefficients: Tensor, step: Tensor, bands: Bands) -> Tensor:
    """One float16 scale per token: root mean square of its coefficients over their deviation, with some headroom."""
    unit = torch.tensor([band.unit_step for band in bands.each], device=step.device, dtype=coefficients.dtype)
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
    for part, band in zip(levels.split(bands.counts, dim=-1), BANDS, strict=True):
        if part.shape[-1] == 0:
            continue
        if band.is_float:
            half = part.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
            parts.append(half.contiguous().view(torch.uint8))
        else:
            parts.append(pack_levels((part + band.top / 2).round().clamp(0, band.top), band.bits))
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
