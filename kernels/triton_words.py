"""Codes in Triton kernels as 16-bit words, and the fields of words as exact numbers without a conversion.

A word is two neighbouring bytes of a band, so it holds `16 / bits` neighbouring components in its fields, the first in the lowest bits.
A tile of words becomes a tile of numbers for each field, and kernels keep queries and outputs in *latent columns*, ordered so: for each
band, for each field, the components of its words, padded to whole tiles. Then no code is shuffled. A `LAYOUT` here has the words of the
narrowest tile behind the components of its bands (`layout_of`).

The bits of a level, alone in the low byte of a float16 number, are a subnormal one: the level times 2^-24, and 2^4 times as much where
they start at bit 4. Nothing has to be converted or taken off. Two words lie in a register, and one `and` takes a field of both.
"""

import triton
import triton.language as tl

from apack_compile.kernels.format import WIDTHS, Bands
from apack_compile.kernels.triton_bands import (
    BAND_COUNT,
    band_bytes,
    first_byte,
    first_component,
    is_float,
    level_bits,
    token_bytes,
    top_level,
)

# Wider tiles than 64 words need more registers than they save instructions.
TILES = (64, 32, 16, 8)
# Words of the narrowest tile: the matrix unit takes sums over 16 float16 numbers, and gives 8 sums for each row at least.
SUMMED, GIVEN = tl.constexpr(16), tl.constexpr(8)
# A tile wider than the narrowest is taken where it pads a band at most this much.
PADDING = 1.1
# Latent columns that one program takes in projections.
COLUMN_BLOCK = tl.constexpr(64)
# What the lowest bit of a float16 number is worth.
SMALLEST = tl.constexpr(2.0**-24)
# Numbers that a product of the matrix unit has at least on its first side: of ones, where it only adds.
SUM_ROWS = tl.constexpr(16)
WORD_BITS, BYTE_BITS = 16, 8


def layout_of(bands: Bands, narrowest: int) -> tuple[int, ...]:
    """A stream's layout, with tiles of so many words or more."""
    return (*bands.counts, narrowest)


@triton.constexpr_function
def fields(band):
    """Components in a word."""
    return WORD_BITS // WIDTHS[band]


@triton.constexpr_function
def words(layout, band):
    """Words of a band; the last may reach into the next band's first byte."""
    return -(-band_bytes(layout, band) // 2)


@triton.constexpr_function
def tile(layout, band):
    """Words in a tile of a band."""
    count, least = words(layout, band), layout[BAND_COUNT.value]
    return next(width for width in TILES if width == least or -(-count // width) * width <= PADDING * count)


@triton.constexpr_function
def tiles(layout, band):
    """Tiles of a band."""
    return -(-words(layout, band) // tile(layout, band))


@triton.constexpr_function
def first_column(layout, band):
    """First latent column of a band."""
    return sum(fields(b) * tile(layout, b) * tiles(layout, b) for b in range(band))


@triton.constexpr_function
def column_count(layout):
    """Latent columns of all bands."""
    return first_column(layout, BAND_COUNT.value)


@triton.constexpr_function
def column_blocks(layout):
    """Blocks of latent columns; at least one, since a stream of no components still has a mean."""
    return max(1, -(-column_count(layout) // COLUMN_BLOCK.value))


@triton.constexpr_function
def tile_column(layout, band, number, field):
    """First latent column of a tile's components in a field of their words."""
    width = tile(layout, band)
    return first_column(layout, band) + (field * tiles(layout, band) + number) * width


@triton.constexpr_function
def tile_number(layout, band, number):
    """A band's tile, counted over all bands."""
    return sum(tiles(layout, b) for b in range(band)) + number


@triton.constexpr_function
def has_levels(layout):
    """Whether a layout has an integer band."""
    return any(layout[band] and not is_float(band) for band in range(BAND_COUNT.value))


@triton.constexpr_function
def field_byte(band, field):
    """The byte of a word that a field is in."""
    return field * level_bits(band) // BYTE_BITS


@triton.constexpr_function
def field_bit(band, field):
    """The lowest bit of a field in its byte."""
    return field * level_bits(band) % BYTE_BITS


@triton.constexpr_function
def field_mask(band, field):
    """The bits of a field in its byte."""
    return (2 ** level_bits(band) - 1) << field_bit(band, field)


@triton.constexpr_function
def field_unit(band, field, dot):
    """What `levels` gives for a level of one in a field."""
    return 1.0 if is_float(band) or dot == tl.float32 else SMALLEST.value * 2.0 ** field_bit(band, field)


@triton.constexpr_function
def level_offset(band, dot):
    """What `levels`, in its units, is above the coefficients in units of their step."""
    return 0.0 if is_float(band) or dot == tl.float32 else top_level(band) / 2


@triton.constexpr_function
def assembly(band):
    """Instructions that take the fields of the two words in a register apart, each pair into a register of its own."""
    count = fields(band)
    lines, given = [], f"${count}"
    for field in range(count):
        if field_byte(band, field) and not field_byte(band, field - 1):
            lines.append(f"shr.u32 upper, {given}, {BYTE_BITS};")
            given = "upper"
        mask = field_mask(band, field)
        lines.append(f"and.b32 ${field}, {given}, {mask << WORD_BITS | mask:#x};")
    return f"{{ .reg .b32 upper; {' '.join(lines)} }}"


@triton.constexpr_function
def registers(band):
    """The operands of `assembly`."""
    return ",".join(["=r"] * fields(band) + ["r"])


@triton.jit
def levels(loaded, BAND: tl.constexpr, DOT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A tile of numbers for each field of a tile of words, in DOT, float16 or float32: exact, in units of `field_unit`.

    In float16 they are `level_offset` too high, which is left to the caller, who takes it off once. ASSEMBLY: two words at a time; else
    the same in Triton's own words, as its interpreter wants it.
    """
    if is_float(BAND):
        return (loaded.to(tl.float16, bitcast=True).to(DOT),)
    elif DOT == tl.float32:
        found = ()
        for field in tl.static_range(fields(BAND)):
            level = (loaded.to(tl.int32) >> (field * level_bits(BAND))) & ((1 << level_bits(BAND)) - 1)
            found = found + (level.to(tl.float32) - top_level(BAND) / 2,)
        return found
    elif ASSEMBLY:
        return tl.inline_asm_elementwise(
            assembly(BAND), registers(BAND), [loaded], dtype=(tl.float16,) * fields(BAND), is_pure=True, pack=2
        )
    else:
        found = ()
        for field in tl.static_range(fields(BAND)):
            byte = loaded >> (8 * field_byte(BAND, field))
            found = found + ((byte & field_mask(BAND, field)).to(tl.float16, bitcast=True),)
        return found


@triton.jit
def load_words(codes, start, inside, LAYOUT: tl.constexpr, BAND: tl.constexpr, NUMBER: tl.constexpr):
    """Tile `NUMBER` of a band's words `[tokens, tile]`, int16, from token `start` on; zero where `inside` `[tokens, 1]` is not set.

    codes: pointer to those of token 0, of int16 where all tokens start at even addresses, else of uint8. A word that is not whole has the
    next band's byte, or zero, in its upper fields: no component is there.
    """
    # addresses that depend on the start are worked out where they are needed, and take no registers through the loop over blocks
    token = (start + tl.arange(0, inside.shape[0]))[:, None]
    word = NUMBER * tile(LAYOUT, BAND) + tl.arange(0, tile(LAYOUT, BAND))[None, :]
    if codes.dtype.element_ty == tl.int16 and first_byte(LAYOUT, BAND) % 2 == 0:
        wanted = inside
        if tile(LAYOUT, BAND) * tiles(LAYOUT, BAND) != words(LAYOUT, BAND):
            wanted = inside & (word < words(LAYOUT, BAND))
        at = codes + (token * (token_bytes(LAYOUT) // 2) + first_byte(LAYOUT, BAND) // 2 + word)
        return tl.load(at, mask=wanted, other=0)
    else:
        wanted = inside & (word < words(LAYOUT, BAND))
        byte = token * token_bytes(LAYOUT) + first_byte(LAYOUT, BAND) + 2 * word
        at = codes.to(tl.pointer_type(tl.uint8), bitcast=True) + byte
        low = tl.load(at, mask=wanted, other=0).to(tl.int16)
        high = tl.load(at + 1, mask=wanted & (2 * word + 1 < band_bytes(LAYOUT, BAND)), other=0).to(tl.int16)
        return low | (high << 8)


@triton.jit
def component_of(column, LAYOUT: tl.constexpr):
    """Component of each latent column, -1 for padding."""
    component = tl.full(column.shape, -1, tl.int32)
    for band in tl.static_range(BAND_COUNT):
        if LAYOUT[band] > 0:
            side = tile(LAYOUT, band) * tiles(LAYOUT, band)
            local = column - first_column(LAYOUT, band)
            own = (local % side) * fields(band) + local // side
            inside = (local >= 0) & (local < side * fields(band)) & (own < LAYOUT[band])
            component = tl.where(inside, first_component(LAYOUT, band) + own, component)
    return component


@triton.jit
def step_of(column, LAYOUT: tl.constexpr, DOT: tl.constexpr):
    """By what a latent is divided for `levels`, in units of 2^-24 where these are; and `level_offset`: of each latent column."""
    divisor = tl.full(column.shape, 1.0, tl.float32)
    offset = tl.zeros(column.shape, tl.float32)
    for band in tl.static_range(BAND_COUNT):
        if LAYOUT[band] > 0 and not is_float(band) and DOT == tl.float16:
            field = (column - first_column(LAYOUT, band)) // (tile(LAYOUT, band) * tiles(LAYOUT, band))
            inside = (column >= first_column(LAYOUT, band)) & (column < first_column(LAYOUT, band + 1))
            bit = (field * level_bits(band)) % 8
            divisor = tl.where(inside, tl.exp2(bit.to(tl.float32)), divisor)
            offset = tl.where(inside, level_offset(band, DOT), offset)
    return divisor, offset
