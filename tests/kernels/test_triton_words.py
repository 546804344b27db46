"""Words of codes, and the numbers in them: against kernels/format.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
tl = pytest.importorskip("triton.language", reason="Triton is for Linux only")

from apack_compile.kernels import triton_words
from apack_compile.kernels.format import WIDTHS, Bands, centered_levels
from apack_compile.kernels.triton_bands import BAND_COUNT, is_float, level_bits

TOKENS = 16
INTEGER_BANDS = [band for band in range(BAND_COUNT.value) if not is_float(band)]


@triton.jit
def read_kernel(
    codes, start, out, LAYOUT: tl.constexpr, DOT: tl.constexpr, ASSEMBLY: tl.constexpr, COLUMNS: tl.constexpr
):
    """Coefficients in units of their step `[tokens, latent columns]`, as attention reads them."""
    inside = tl.arange(0, 16)[:, None] < 16
    for band in tl.static_range(BAND_COUNT):
        for number in tl.static_range(triton_words.tiles(LAYOUT, band)):
            loaded = triton_words.load_words(codes, start, inside, LAYOUT, band, number)
            level = triton_words.levels(loaded, band, DOT, ASSEMBLY)
            for field in tl.static_range(triton_words.fields(band)):
                column = tl.arange(0, triton_words.tile(LAYOUT, band))
                column += triton_words.tile_column(LAYOUT, band, number, field)
                own = level[field].to(tl.float32) * (1.0 / triton_words.field_unit(band, field, DOT))
                own -= triton_words.level_offset(band, DOT)
                tl.store(out + tl.arange(0, 16)[:, None] * COLUMNS + column[None, :], own)


@triton.jit
def columns_kernel(component, divisor, offset, LAYOUT: tl.constexpr, DOT: tl.constexpr, COLUMNS: tl.constexpr):
    """What is known of each latent column."""
    column = tl.arange(0, COLUMNS)
    tl.store(component + column, triton_words.component_of(column, LAYOUT))
    by, above = triton_words.step_of(column, LAYOUT, DOT)
    tl.store(divisor + column, by)
    tl.store(offset + column, above)


def read(codes, bands, dot, assembly=False, narrowest=16, start=0):
    """What attention reads of codes from token `start` on, `[tokens, latent columns]`."""
    layout = triton_words.layout_of(bands, narrowest)
    columns = triton_words.column_count(layout)
    out = torch.full((TOKENS, columns), float("nan"), device=codes.device)
    read_kernel[(1,)](codes, start, out, LAYOUT=layout, DOT=dot, ASSEMBLY=assembly, COLUMNS=columns)
    return out


def components_of(bands, dot, device, narrowest=16):
    """Component, divisor and offset of each latent column."""
    layout = triton_words.layout_of(bands, narrowest)
    columns = triton_words.column_count(layout)
    padded = triton.next_power_of_2(columns)
    found = [torch.empty(padded, dtype=kind, device=device) for kind in (torch.int32, torch.float32, torch.float32)]
    columns_kernel[(1,)](*found, LAYOUT=layout, DOT=dot, COLUMNS=padded)
    return [x[:columns] for x in found]


def random_codes(bands, device, tokens=TOKENS):
    """Codes `[tokens, bytes]`; what is read as float16 is a number."""
    codes = torch.randint(0, 256, (tokens, bands.token_bytes), dtype=torch.uint8)
    codes[:, : 2 * bands.counts[0]] = torch.randn(tokens, bands.counts[0]).half().view(torch.uint8)
    return codes.to(device)


counts = st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(any)


@settings(max_examples=40, deadline=None)
@given(
    counts,
    st.sampled_from((tl.float16, tl.float32)),
    st.booleans(),
    st.sampled_from((triton_words.SUMMED.value, triton_words.GIVEN.value)),
    st.integers(0, 3),
)
def test_words_hold_the_components_of_the_format(device, counts, dot, as_words, narrowest, start):
    bands = Bands(tuple(counts))
    codes = random_codes(bands, device, start + TOKENS)
    given_codes = codes.view(torch.int16) if as_words and bands.token_bytes % 2 == 0 else codes
    own = read(given_codes, bands, dot, narrowest=narrowest, start=start)
    component, _, offset = components_of(bands, dot, device, narrowest)
    exact = centered_levels(codes.cpu()[start:], bands, torch.float64)
    known = (component >= 0).cpu()
    assert sorted(component[component >= 0].tolist()) == list(range(bands.components))
    assert torch.equal(own.cpu()[:, known].double(), exact[:, component.cpu()[known].long()])
    assert own.isfinite().all()
    tops = torch.tensor([0.0 if band.is_float or dot == tl.float32 else band.top / 2 for band in bands.each])
    assert torch.equal(offset.cpu()[known], tops[component.cpu()[known].long()])


@pytest.mark.parametrize("band", INTEGER_BANDS)
def test_a_latent_is_divided_by_what_its_field_is_too_large(device, band):
    bands = Bands(tuple(64 if other == band else 0 for other in range(BAND_COUNT.value)))
    codes = torch.full((TOKENS, bands.token_bytes), 0xFF, dtype=torch.uint8, device=device)
    component, divisor, offset = components_of(bands, tl.float16, device)
    stored = (read(codes, bands, tl.float16)[0] + offset) * divisor * 2.0**-24
    # all ones: the top level, wherever it is in its byte
    top = 2.0 ** level_bits(band) - 1
    known = component >= 0
    for number, of_column in zip(component[known].tolist(), stored[known].tolist(), strict=True):
        shift = level_bits(band) * number % 8
        assert of_column == top * 2.0 ** (shift - 24)


@pytest.mark.parametrize("band", INTEGER_BANDS)
def test_the_instructions_take_every_bit_of_two_words_once(band):
    lines = triton_words.assembly(band)
    masks = [int(part.split(";")[0], 16) for part in lines.split("0x")[1:]]
    assert len(masks) == 16 // WIDTHS[band] == lines.count("and.b32")
    half = len(masks) // 2
    for masks_of_byte in (masks[:half], masks[half:]):
        assert sum(masks_of_byte) == 0x00FF00FF
        assert all(a & b == 0 for i, a in enumerate(masks_of_byte) for b in masks_of_byte[:i])
    assert lines.index("shr.u32 upper") > lines.index(f"and.b32 ${half - 1},")
    assert lines.index("shr.u32 upper") < lines.index(f"and.b32 ${half},")


@pytest.mark.parametrize("band", INTEGER_BANDS)
def test_instructions_and_their_twin_agree_bit_for_bit(device, band):
    if device.type != "cuda":
        pytest.skip("instructions need a GPU")
    bands = Bands(tuple(96 if other == band else 0 for other in range(BAND_COUNT.value)))
    codes = random_codes(bands, device)
    assert torch.equal(read(codes, bands, tl.float16, True), read(codes, bands, tl.float16, False))
