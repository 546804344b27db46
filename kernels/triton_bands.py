"""Bands in Triton kernels: how a token's components lie in its bytes. A `LAYOUT` is the number of components in each band."""

import triton
import triton.language as tl

from apack_compile.kernels.format import WIDTHS, unit_of

BAND_COUNT = tl.constexpr(len(WIDTHS))
# By band: components and bytes of a unit.
PER_UNIT, UNIT_BYTES = zip(*map(unit_of, WIDTHS), strict=True)
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.constexpr_function
def per_unit(band):
    """Components of a band that share a unit."""
    return PER_UNIT[band]


@triton.constexpr_function
def unit_bytes(band):
    """Bytes of a band's unit."""
    return UNIT_BYTES[band]


@triton.constexpr_function
def units(layout, band):
    """Units of a band."""
    return -(-layout[band] // per_unit(band))


@triton.constexpr_function
def band_bytes(layout, band):
    """Bytes of a band in a token."""
    return unit_bytes(band) * units(layout, band)


@triton.constexpr_function
def first_byte(layout, band):
    """First byte of a band in a token."""
    return sum(band_bytes(layout, b) for b in range(band))


@triton.constexpr_function
def token_bytes(layout):
    """Bytes of a token."""
    return first_byte(layout, BAND_COUNT.value)


@triton.constexpr_function
def first_component(layout, band):
    """First component of a band."""
    return sum(layout[:band])


@triton.constexpr_function
def component_count(layout):
    """Components of all bands."""
    return first_component(layout, BAND_COUNT.value)


@triton.constexpr_function
def level_bits(band):
    """Bits of a component."""
    return WIDTHS[band]


@triton.constexpr_function
def is_float(band):
    """Whether a band's components are float16 numbers, not levels."""
    return level_bits(band) == 16


@triton.constexpr_function
def top_level(band):
    """Highest level of an integer band."""
    return 2.0 ** level_bits(band) - 1
