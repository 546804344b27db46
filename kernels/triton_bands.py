"""Bands in Triton kernels: how a token's components lie in its bytes, and levels as exact floats without a conversion.

A unit (`unit_of` of kernels/format.py) holds `per_unit` neighbouring components, so a tile of units is that many tiles of every
`per_unit`-th component. Kernels keep queries and outputs in *latent columns*, ordered so: for each band, for each place in the unit, its
components, padded to whole tiles. Then no code is shuffled. A `layout` is the components of each band, then the width of the smallest
tile.
"""

import triton
import triton.language as tl

from apack_compile.kernels.format import WIDTHS, Bands, unit_of

BAND_COUNT = tl.constexpr(len(WIDTHS))
# By band: components and bytes of a unit.
PER_UNIT, UNIT_BYTES = zip(*map(unit_of, WIDTHS), strict=True)
FLOAT16_MAX = tl.constexpr(65504.0)
# The matrix unit takes sums over 16 components. Hopper's wants 64 rows, which are the components where values are summed over tokens.
SMALLEST_TILE, SMALLEST_VALUE_TILE = 16, 64
# Latent columns that one program takes in projections.
COLUMN_BLOCK = tl.constexpr(64)


def key_layout(bands: Bands) -> tuple[int, ...]:
    """Layout of components that are summed over."""
    return (*bands.counts, SMALLEST_TILE)


def value_layout(bands: Bands) -> tuple[int, ...]:
    """Layout of components that stay, while tokens are summed over."""
    return (*bands.counts, SMALLEST_VALUE_TILE)


@triton.constexpr_function
def per_unit(band):
    """Components of a band that share a unit."""
    return PER_UNIT[band]


@triton.constexpr_function
def unit_bytes(band):
    """Bytes of a band's unit."""
    return UNIT_BYTES[band]


@triton.constexpr_function
def tile_units(layout, band):
    """Units of a band."""
    return -(-layout[band] // per_unit(band))


@triton.constexpr_function
def tile(layout, band):
    """Width of a band's tiles: the smallest that holds it, or 128 or 64, whichever pads less."""
    units = tile_units(layout, band)
    for width in (16, 32, 64):
        if layout[-1] <= width and units <= width:
            return width
    return 128 if -(-units // 128) * 2 <= -(-units // 64) else 64


@triton.constexpr_function
def tiles(layout, band):
    """Tiles of a band."""
    return -(-tile_units(layout, band) // tile(layout, band))


@triton.constexpr_function
def channel_tile(channels):
    """Width of the tiles of so many dense channels, as of so many components of 16 bits."""
    return tile((channels, SMALLEST_TILE), 0)


@triton.constexpr_function
def channel_tiles(channels):
    """Tiles of so many dense channels."""
    return tiles((channels, SMALLEST_TILE), 0)


@triton.constexpr_function
def first_column(layout, band):
    """First latent column of a band."""
    return sum(per_unit(b) * tile(layout, b) * tiles(layout, b) for b in range(band))


@triton.constexpr_function
def column_count(layout):
    """Latent columns of all bands."""
    return first_column(layout, BAND_COUNT.value)


@triton.constexpr_function
def column_blocks(layout):
    """Blocks of latent columns; at least one, since a stream of no components still has a mean."""
    return max(1, -(-column_count(layout) // COLUMN_BLOCK.value))


@triton.constexpr_function
def tile_column(layout, band, number, place):
    """First latent column of a tile's components at `place` in their units."""
    width = tile(layout, band)
    return first_column(layout, band) + (place * tiles(layout, band) + number) * width


@triton.constexpr_function
def tile_number(layout, band, number):
    """A band's tile, counted over all bands."""
    return sum(tiles(layout, b) for b in range(band)) + number


@triton.constexpr_function
def first_component(layout, band):
    """First component of a band."""
    return sum(layout[:band])


@triton.constexpr_function
def component_count(layout):
    """Components of all bands."""
    return first_component(layout, BAND_COUNT.value)


@triton.constexpr_function
def first_byte(layout, band):
    """First byte of a band in a token."""
    return sum(unit_bytes(b) * tile_units(layout, b) for b in range(band))


@triton.constexpr_function
def token_bytes(layout):
    """Bytes of a token."""
    return first_byte(layout, BAND_COUNT.value)


@triton.constexpr_function
def is_whole(layout, band):
    """Whether a band fills its tiles."""
    return tile_units(layout, band) == tile(layout, band) * tiles(layout, band)


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


@triton.constexpr_function
def float16_offset(band):
    """What a band's levels as float16 numbers are above the coefficients in units of their step."""
    return 0.0 if is_float(band) else 2.0 ** level_bits(band) + top_level(band) / 2


@triton.constexpr_function
def mantissa_shift(band, place):
    """How far left the level at a place of its unit goes to become the leading mantissa bits of a float16 number."""
    return 10 - level_bits(band) * (place + 1)


@triton.constexpr_function
def mantissa_mask(band):
    """The leading mantissa bits of a float16 number that hold a level."""
    return (2 ** level_bits(band) - 1) << (10 - level_bits(band))


@triton.constexpr_function
def power_of_two(band):
    """The bits of the float16 number 2^bits, above every level of a band."""
    return (15 + level_bits(band)) << 10


@triton.constexpr_function
def level_offset(band, dot):
    """What `levels` gives above the coefficients in units of their step."""
    return 0.0 if dot == tl.float32 else float16_offset(band)


@triton.jit
def levels(units, BAND: tl.constexpr, PLACE: tl.constexpr, DOT: tl.constexpr):
    """Components at `PLACE` of loaded units, `level_offset` too high; exact in DOT, float16 or float32.

    The level becomes the leading mantissa bits of the float16 number 2^bits: a shift and a mask, where a conversion would
    cost several times as much. In float16 the offset is left to the caller, who takes it off once; in float32 it would cost digits.
    """
    if is_float(BAND):
        half = units
    else:
        shift: tl.constexpr = mantissa_shift(BAND, PLACE)
        if shift < 0:
            level = (units >> -shift).to(tl.uint16)
        else:
            level = units.to(tl.uint16) << shift
        half = ((level & mantissa_mask(BAND)) | power_of_two(BAND)).to(tl.float16, bitcast=True)
    if DOT == tl.float32:
        return half.to(tl.float32) - float16_offset(BAND)
    else:
        return half


@triton.jit
def load_units(token, mask, LAYOUT: tl.constexpr, BAND: tl.constexpr, NUMBER: tl.constexpr, EVEN: tl.constexpr):
    """Tile `NUMBER` of a band: units, or float16, `[tokens, tile]`; zero where `mask` `[tokens, 1]` is not set.

    token: pointers `[tokens, 1]` to the tokens' first bytes. EVEN: whether these are multiples of 2.
    """
    unit = NUMBER * tile(LAYOUT, BAND) + tl.arange(0, tile(LAYOUT, BAND))[None, :]
    inside = mask
    if not is_whole(LAYOUT, BAND):
        inside = mask & (unit < tile_units(LAYOUT, BAND))
    at = token + (first_byte(LAYOUT, BAND) + unit_bytes(BAND) * unit)
    if unit_bytes(BAND) == 1:
        return tl.load(at, mask=inside, other=0)
    elif is_float(BAND) and EVEN:
        # the first band, so it starts where the token does
        return tl.load(token.to(tl.pointer_type(tl.float16), bitcast=True) + unit, mask=inside, other=0.0)
    else:
        whole = tl.load(at, mask=inside, other=0).to(tl.uint32)
        for i in tl.static_range(1, unit_bytes(BAND)):
            whole = whole | (tl.load(at + i, mask=inside, other=0).to(tl.uint32) << (8 * i))
        if is_float(BAND):
            return whole.to(tl.uint16).to(tl.float16, bitcast=True)
        else:
            return whole


@triton.jit
def component_of(column, LAYOUT: tl.constexpr):
    """Component of each latent column, -1 for padding."""
    component = tl.full(column.shape, -1, tl.int32)
    for band in tl.static_range(BAND_COUNT):
        if LAYOUT[band] > 0:
            side = tile(LAYOUT, band) * tiles(LAYOUT, band)
            local = column - first_column(LAYOUT, band)
            own = (local % side) * per_unit(band) + local // side
            inside = (local >= 0) & (local < side * per_unit(band)) & (own < LAYOUT[band])
            component = tl.where(inside, first_component(LAYOUT, band) + own, component)
    return component


@triton.jit
def offset_of(column, LAYOUT: tl.constexpr, DOT: tl.constexpr):
    """`level_offset` of each latent column's band."""
    offset = tl.zeros(column.shape, tl.float32)
    for band in tl.static_range(BAND_COUNT):
        inside = (column >= first_column(LAYOUT, band)) & (column < first_column(LAYOUT, band + 1))
        offset = tl.where(inside, level_offset(band, DOT), offset)
    return offset
