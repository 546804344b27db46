"""append and encode in Triton: codes as the format wants them, in the interpreter, or compiled with --device=cuda."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from state_lists import append_with
from states import APPEND, Shape, State, build, each_slot
from states import append as append_and_expect
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

from apack_compile.kernels import cuda
from apack_compile.kernels.encode.triton import quantize as quantize_in_triton
from apack_compile.kernels.format import (
    FLOAT16_MAX,
    WIDTHS,
    Bands,
    StreamBasis,
    centered_levels,
    project,
    quantize,
    token_scales,
)
from apack_compile.kernels.heads import to_groups
from apack_compile.plan.basis import fit, moments

append = append_with(cuda.append)
pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_codes_of(x: Tensor, codes: Tensor, scales: Tensor, basis: StreamBasis, bands: Bands) -> None:
    """Codes of tokens `[B, G, N, W_g]` are the nearest levels of their float64 coefficients, up to float32 near a tie.

    A small coefficient of a large token carries the rounding of the large components that cancel in it.
    """
    exact = StreamBasis(*(tensor.double() for tensor in basis))
    coefficients = project(x.double(), exact)
    if scales.numel():
        wanted = token_scales(coefficients, exact.step, bands).double()
        assert ((scales.double() - wanted).abs() <= 2.0**-10 * wanted).all()
        coefficients = coefficients / scales.double()[..., None]
    levels = coefficients / exact.step[:, :, None]
    rounding = 2.0**-20 * x.double().norm(dim=-1, keepdim=True) / exact.step[:, :, None]
    if scales.numel():
        rounding = rounding / scales.double()[..., None]
    bits = torch.tensor(bands.widths)
    reach = torch.where(bits == 16, FLOAT16_MAX, (2.0**bits - 1) / 2)
    wanted = levels.clamp(-reach, reach)
    allowed = torch.where(bits == 16, wanted.abs() * 2.0**-10 + 2.0**-20, 0.5 + 1e-3)
    assert ((centered_levels(codes, bands, torch.float64) - wanted).abs() <= allowed + rounding).all()


def rotations_on(state: State, device: torch.device) -> dict:
    """What append is told about rotations."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in state.rotated_text.items()}


def copied(state: State, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[int], Tensor]:
    """The arguments of append, in memory of their own."""
    stores, bases, bands, cursor = state.appended
    return [x.to(device).clone() for x in stores], [x.to(device) for x in bases], bands, cursor.to(device).clone()


@st.composite
def shapes(draw) -> Shape:
    """States that tokens are appended to."""
    heads, groups = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1), (4, 2))))
    head_dim = draw(st.sampled_from((5, 8, 24, 72)))
    width = heads // groups * head_dim
    counts = st.permutations([draw(st.integers(0, width // 4)) for _ in range(3)] + [draw(st.integers(1, 2))])
    return Shape(
        batch=draw(st.sampled_from((1, 3))),
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        laid_out=draw(st.integers(5, 30)),
        tail=draw(st.sampled_from((0, 1, 3, 8))),
        chunks=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))),
        bands=tuple(tuple(draw(counts)) for _ in range(4)),
        scope=draw(st.sampled_from(("model", "sequence", "as is"))),
        token_scale=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 10**6)),
        block=draw(st.sampled_from((0, 3, 16, 24))),
    )


@settings(max_examples=20, deadline=None)
@given(shapes())
@example(Shape(chunks=(32,), tail=8, dtype=torch.bfloat16))
@example(Shape(chunks=(32,), tail=8, block=16, heads=4, groups=2, head_dim=24, dtype=torch.bfloat16))
@example(Shape(chunks=(9, 5), tail=3, block=3, scope="as is", dtype=torch.float16))
def test_append_packs_what_leaves_the_tail_and_nothing_else(device, shape):
    state = build(shape)
    stores, bases, bands, cursor = copied(state, device)
    first_slot = state.packed - int(state.cursor[2])
    before = [x.cpu().clone() for x in stores[2:]]
    tokens = [[], []]
    for count in shape.chunks:
        append_and_expect(state, shape, count)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2).to(device) for x in (state.key, state.value)]
        append(*strided, stores, bases, bands, cursor, **rotations_on(state, device))
        for kept, new in zip(tokens, (state.key, state.value), strict=True):
            kept.append(new)
    assert torch.equal(cursor.cpu(), state.cursor)
    for own, wanted in zip(stores[:2], state.dense[2:], strict=True):
        assert torch.equal(own.cpu(), wanted)
    last_slot = int(cursor[1] - cursor[2])
    for i in range(2):
        codes, scales = (x.cpu() for x in stores[2 + 2 * i : 4 + 2 * i])
        for own, untouched in zip((codes, scales), before[2 * i : 2 * i + 2], strict=True):
            if own.numel():
                assert torch.equal(own[:, :, :first_slot], untouched[:, :, :first_slot])
                assert torch.equal(own[:, :, last_slot:], untouched[:, :, last_slot:])
        left = torch.cat(tokens[i], dim=2)[:, :, : last_slot - first_slot]
        if i == 0 and state.rotated:
            left = each_slot(left.double(), state.rotated, -1, list(range(first_slot, last_slot)), -1)
        left = to_groups(left, shape.groups)
        written = slice(first_slot, last_slot)
        if shape.scope == "as is":
            # float32 products may fall on the other side of a tie
            rounding = torch.finfo(codes.dtype).eps * left.abs() + 1e-6 if i == 0 and state.rotated else 0
            assert ((codes[:, :, written].double() - left.double()).abs() <= rounding).all()
        elif left.shape[2]:
            basis = StreamBasis(*(x.cpu() for x in bases[3 * i : 3 * i + 3]))
            counts = Bands(tuple(bands[4 * i : 4 * i + 4]))
            own_scales = scales[:, :, written] if scales.numel() else scales
            assert_codes_of(left, codes[:, :, written], own_scales, basis, counts)


@pytest.mark.parametrize("tail", (0, 4))
def test_a_token_without_a_free_slot_touches_no_other(device, tail):
    shape = Shape(spare=2, tail=tail, chunks=(), dtype=torch.float32)
    state = build(shape)
    stores, bases, bands, cursor = copied(state, device)
    room = torch.full((2, 3, *stores[2].shape[1:]), 7, dtype=torch.uint8, device=device)
    room[:, 1] = stores[2]
    stores[2] = room[:, 1]
    token = torch.ones(2, 2, 7 + tail, 5, device=device)
    append(token, token, stores, bases, bands, cursor)
    assert int(cursor[0]) == shape.laid_out + 7 + tail
    assert (room[:, ::2] == 7).all()


def test_float64_is_appended_by_the_reference(device):
    states = [build(Shape()) for _ in range(2)]
    token = torch.randn(2, 2, 9, 5, dtype=torch.float64)
    own = copied(states[0], device)
    append(token.to(device), token.to(device), *own)
    APPEND(token, token, *states[1].appended)
    for got, wanted in zip((*own[0], own[3]), (*states[1].appended[0], states[1].cursor), strict=True):
        assert torch.equal(got.cpu(), wanted)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_encode_gives_the_reference_codes(device, data):
    batch, groups, tokens = (data.draw(st.sampled_from(values)) for values in ((1, 2), (1, 3), (0, 1, 9)))
    counts = tuple(data.draw(st.sampled_from((0, 0, 1, 3, 16, 37))) for _ in WIDTHS)
    bands, scaled = Bands(counts), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    sequences = data.draw(st.sampled_from((1, batch)))
    width = max(bands.components, 1)
    x = torch.randn(batch, groups, tokens, width, generator=generator) * torch.logspace(0.5, -2, width)
    if data.draw(st.booleans()):
        x = x * data.draw(st.sampled_from((0.0, 1e-7, 1e6)))
    basis = fit(moments(torch.randn(sequences, groups, 50, width, generator=generator))).basis(bands)
    coefficients = project(x, basis)
    codes, scales = quantize_in_triton(coefficients.to(device), basis.step.to(device), bands, scaled)
    wanted_codes, wanted_scales = quantize(coefficients, basis.step, bands, scaled)
    assert codes.shape == wanted_codes.shape and codes.dtype == torch.uint8
    assert scales.shape == wanted_scales.shape
    same = (
        scales.cpu() == wanted_scales if wanted_scales.numel() else torch.ones(batch, groups, tokens, dtype=torch.bool)
    )
    assert torch.equal(codes.cpu()[same], wanted_codes[same])
    assert_codes_of(x, codes.cpu(), scales.cpu(), basis, bands)
