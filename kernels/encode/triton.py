"""Coefficients to codes in one pass, in Triton: the second half of `encode`, which it must equal."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apack_compile.kernels.format import BANDS, MIN_TOKEN_SCALE, Bands
from apack_compile.kernels.triton_bands import (
    BAND_COUNT,
    FLOAT16_MAX,
    component_count,
    first_byte,
    first_component,
    is_float,
    level_bits,
    per_unit,
    token_bytes,
    top_level,
    unit_bytes,
    units,
)

# Adding and taking off 1.5 * 2^23 rounds a float32 below 2^22 to the nearest integer, ties to even, as torch.round does.
ROUNDER = tl.constexpr(12582912.0)
SMALLEST_SCALE = tl.constexpr(MIN_TOKEN_SCALE)
UNIT_STEPS = tl.constexpr(tuple(band.unit_step for band in BANDS))


@triton.jit
def token_scale(coefficients, step, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Root mean square of a token's coefficients over their deviation, as `format.token_scales`."""
    rank: tl.constexpr = component_count(LAYOUT)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rank, BLOCK):
        component = start + tl.arange(0, BLOCK)
        real = component < rank
        unit = tl.zeros((BLOCK,), tl.float32)
        for band in tl.static_range(BAND_COUNT):
            own = (component >= first_component(LAYOUT, band)) & (component < first_component(LAYOUT, band + 1))
            unit = tl.where(own, UNIT_STEPS[band], unit)
        given = tl.load(coefficients + component, mask=real, other=0.0)
        normalized = given * tl.div_rn(unit, tl.load(step + component, mask=real, other=1.0))
        squares += normalized * normalized
    scale = tl.sqrt_rn(tl.sum(squares, 0) / rank)
    return tl.minimum(tl.maximum(scale, SMALLEST_SCALE), FLOAT16_MAX).to(tl.float16)


@triton.jit
def quantize_token(coefficients, step, scale, codes, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Write a token's codes. scale: its float16 token scale, or None."""
    for band in tl.static_range(BAND_COUNT):
        for start in range(0, units(LAYOUT, band), BLOCK):
            unit = start + tl.arange(0, BLOCK)
            code = tl.zeros((BLOCK,), tl.int32)
            for place in tl.static_range(per_unit(band)):
                own = unit * per_unit(band) + place
                real = own < LAYOUT[band]
                component = first_component(LAYOUT, band) + own
                given = tl.load(coefficients + component, mask=real, other=0.0)
                level = tl.div_rn(given, tl.load(step + component, mask=real, other=1.0))
                if scale is not None:
                    level = tl.div_rn(level, tl.zeros((BLOCK,), tl.float32) + scale.to(tl.float32))
                if is_float(band):
                    half = tl.minimum(tl.maximum(level, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)
                    code = half.to(tl.uint16, bitcast=True).to(tl.int32)
                else:
                    inside = tl.minimum(tl.maximum(level + top_level(band) / 2, 0.0), top_level(band))
                    rounded = (inside + ROUNDER) - ROUNDER
                    # padding is level 0
                    code += tl.where(real, rounded, 0.0).to(tl.int32) << (place * level_bits(band))
            known = unit < units(LAYOUT, band)
            for i in tl.static_range(unit_bytes(band)):
                at = codes + (first_byte(LAYOUT, band) + unit_bytes(band) * unit + i)
                tl.store(at, (code >> (8 * i) & 0xFF).to(tl.uint8), mask=known)


@triton.jit(do_not_specialize=["tokens"])
def quantize_kernel(
    coefficients,
    step,
    codes,
    scales,
    tokens,
    groups,
    next_batch,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes, and token scales if `scales` is given, of `[B, G, N, r]` coefficients. Grid: tokens; batch and groups."""
    at = tl.program_id(1).to(tl.int64)
    token = at * tokens + tl.program_id(0)
    rank: tl.constexpr = component_count(LAYOUT)
    own_step = step + ((at // groups) * next_batch + at % groups) * rank
    scale = None
    if scales is not None:
        scale = token_scale(coefficients + token * rank, own_step, LAYOUT, BLOCK)
        tl.store(scales + token, scale)
    quantize_token(coefficients + token * rank, own_step, scale, codes + token * token_bytes(LAYOUT), LAYOUT, BLOCK)


def quantize(coefficients: Tensor, step: Tensor, bands: Bands, scaled: bool) -> tuple[Tensor, Tensor]:
    """Codes `[B, G, N, bytes]` and token scales `[B, G, N]` (or empty) of float32 coefficients `[B, G, N, r]`."""
    batch, groups, tokens, rank = coefficients.shape
    codes = torch.empty(batch, groups, tokens, bands.token_bytes, dtype=torch.uint8, device=step.device)
    scaled = scaled and rank > 0
    scales = torch.empty((batch, groups, tokens) if scaled else 0, dtype=torch.float16, device=step.device)
    if codes.numel():
        with torch.cuda.device_of(codes):
            quantize_kernel[(tokens, batch * groups)](
                coefficients.contiguous(),
                step.contiguous(),
                codes,
                scales if scaled else None,
                tokens,
                groups,
                0 if step.shape[0] == 1 else groups,
                LAYOUT=bands.counts,
                BLOCK=block_of(bands),
                num_warps=1 if rank <= 256 else 4,
            )
    return codes, scales


def block_of(bands: Bands) -> int:
    """Bytes or components that a program takes at once."""
    return min(512, max(16, triton.next_power_of_2(bands.components)))
