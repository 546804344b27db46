"""Bands in Triton kernels: how a token's components lie in its bytes, and levels as exact floats without a conversion.

A byte holds `per_byte` neighbouring components, so a tile of bytes is that many tiles of every `per_byte`-th component. Kernels keep
queries and outputs in *latent columns*, ordered so: for each band, for each place in the byte, its components, padded to whole tiles.
Then no code is shuffled. A `layout` is the components of the four bands, then the width of the smallest tile.
"""

import triton
import triton.language as tl

FLOAT16_MAX = tl.constexpr(65504.0)
# The matrix unit takes sums over 16 components. Hopper's wants 64 rows, which are the components where values are summed over tokens.
SMALLEST_TILE, SMALLEST_VALUE_TILE = 16, 64
# Latent columns that one program takes in projections.
COLUMN_BLOCK = tl.constexpr(64)


def key_layout(counts: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Layout of components that are summed over."""
    return (*counts, SMALLEST_TILE)


def value_layout(counts: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Layout of components that stay, while tokens are summed over."""
    return (*counts, SMALLEST_VALUE_TILE)


@triton.constexpr_function
def per_byte(band):
    """Components of a band that share a byte."""
    return (1, 1, 2, 4)[band]


@triton.constexpr_function
def tile_units(layout, band):
    """Bytes of a band, or its 16-bit components."""
    return -(-layout[band] // per_byte(band))


@triton.constexpr_function
def tile(layout, band):
    """Width of a band's tiles: the smallest that holds it, or 128 or 64, whichever pads less."""
    units = tile_units(layout, band)
    for width in (16, 32, 64):
        if layout[4] <= width and units <= width:
            return width
    return 128 if -(-units // 128) * 2 <= -(-units // 64) else 64


@triton.constexpr_function
def tiles(layout, band):
    """Tiles of a band."""
    return -(-tile_units(layout, band) // tile(layout, band))


@triton.constexpr_function
def channel_tile(channels):
    """Width of the tiles of so many dense channels."""
    return tile((channels, 0, 0, 0, SMALLEST_TILE), 0)


@triton.constexpr_function
def channel_tiles(channels):
    """Tiles of so many dense channels."""
    return tiles((channels, 0, 0, 0, SMALLEST_TILE), 0)


@triton.constexpr_function
def first_column(layout, band):
    """First latent column of a band; of band 4, the number of columns."""
    return sum(per_byte(b) * tile(layout, b) * tiles(layout, b) for b in range(band))


@triton.constexpr_function
def column_blocks(layout):
    """Blocks of latent columns; at least one, since a stream of no components still has a mean."""
    return max(1, -(-first_column(layout, 4) // COLUMN_BLOCK.value))


@triton.constexpr_function
def tile_column(layout, band, number, place):
    """First latent column of a tile's components at `place` in their bytes."""
    width = tile(layout, band)
    return first_column(layout, band) + (place * tiles(layout, band) + number) * width


@triton.constexpr_function
def tile_number(layout, band, number):
    """A band's tile, counted over all bands."""
    return sum(tiles(layout, b) for b in range(band)) + number


@triton.constexpr_function
def first_component(layout, band):
    """First component of a band; of band 4, the number of components."""
    return sum(layout[:band])


@triton.constexpr_function
def first_byte(layout, band):
    """First byte of a band in a token; of band 4, the bytes of a token."""
    return sum((2 if b == 0 else 1) * tile_units(layout, b) for b in range(band))


@triton.constexpr_function
def is_whole(layout, band):
    """Whether a band fills its tiles."""
    return tile_units(layout, band) == tile(layout, band) * tiles(layout, band)


@triton.constexpr_function
def level_bits(band):
    """Bits of a component."""
    return (16, 8, 4, 2)[band]


@triton.constexpr_function
def top_level(band):
    """Highest level of an integer band."""
    return 2.0 ** level_bits(band) - 1


@triton.constexpr_function
def float16_offset(band):
    """What a band's levels as float16 numbers are above the coefficients in units of their step."""
    bits = level_bits(band)
    return 0.0 if bits == 16 else 2.0**bits + (2.0**bits - 1) / 2


@triton.constexpr_function
def level_offset(band, dot):
    """What `levels` gives above the coefficients in units of their step."""
    return 0.0 if dot == tl.float32 else float16_offset(band)


@triton.jit
def levels(units, BAND: tl.constexpr, PLACE: tl.constexpr, DOT: tl.constexpr):
    """Components at `PLACE` of loaded bytes, `level_offset` too high; exact in DOT, float16 or float32.

    The level becomes the leading mantissa bits of the float16 number 2^bits: a shift and a mask, where a conversion would
    cost several times as much. In float16 the offset is left to the caller, who takes it off once; in float32 it would cost digits.
    """
    if BAND == 0:
        half = units
    else:
        wide = units.to(tl.uint16)
        if BAND == 1:
            half = ((wide << 2) | 0x5C00).to(tl.float16, bitcast=True)
        elif BAND == 2:
            half = (((wide << (6 - 4 * PLACE)) & 0x03C0) | 0x4C00).to(tl.float16, bitcast=True)
        else:
            half = (((wide << (8 - 2 * PLACE)) & 0x0300) | 0x4400).to(tl.float16, bitcast=True)
    if DOT == tl.float32:
        return half.to(tl.float32) - float16_offset(BAND)
    else:
        return half


@triton.jit
def load_units(token, mask, LAYOUT: tl.constexpr, BAND: tl.constexpr, NUMBER: tl.constexpr, EVEN: tl.constexpr):
    """Tile `NUMBER` of a band: bytes, or float16, `[tokens, tile]`; zero where `mask` `[tokens, 1]` is not set.

    token: pointers `[tokens, 1]` to the tokens' first bytes. EVEN: whether these are multiples of 2.
    """
    unit = NUMBER * tile(LAYOUT, BAND) + tl.arange(0, tile(LAYOUT, BAND))[None, :]
    inside = mask
    if not is_whole(LAYOUT, BAND):
        inside = mask & (unit < tile_units(LAYOUT, BAND))
    if BAND > 0:
        return tl.load(token + (first_byte(LAYOUT, BAND) + unit), mask=inside, other=0)
    elif EVEN:
        return tl.load(token.to(tl.pointer_type(tl.float16), bitcast=True) + unit, mask=inside, other=0.0)
    else:
        low = tl.load(token + 2 * unit, mask=inside, other=0).to(tl.uint16)
        high = tl.load(token + (2 * unit + 1), mask=inside, other=0).to(tl.uint16)
        return (low | (high << 8)).to(tl.float16, bitcast=True)


@triton.jit
def component_of(column, LAYOUT: tl.constexpr):
    """Component of each latent column, -1 for padding."""
    component = tl.full(column.shape, -1, tl.int32)
    for band in tl.static_range(4):
        if LAYOUT[band] > 0:
            side = tile(LAYOUT, band) * tiles(LAYOUT, band)
            local = column - first_column(LAYOUT, band)
            own = (local % side) * per_byte(band) + local // side
            inside = (local >= 0) & (local < side * per_byte(band)) & (own < LAYOUT[band])
            component = tl.where(inside, first_component(LAYOUT, band) + own, component)
    return component


@triton.jit
def offset_of(column, LAYOUT: tl.constexpr, DOT: tl.constexpr):
    """`level_offset` of each latent column's band."""
    offset = tl.zeros(column.shape, tl.float32)
    for band in tl.static_range(4):
        inside = (column >= first_column(LAYOUT, band)) & (column < first_column(LAYOUT, band + 1))
        offset = tl.where(inside, level_offset(band, DOT), offset)
    return offset
