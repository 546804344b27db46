"""attend in Triton against the float64 reference: in the interpreter, or compiled with --device=cuda."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_calls import Case, build, without_garbage
from state_lists import attend_with, state_of, unpack_with
from states import SHARES, Shape, State, allowed_by, attention, filled
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

from apack_compile.kernels.attend import reference as attend_reference
from apack_compile.kernels.attend import triton, triton_launch
from apack_compile.kernels.format import Bands
from apack_compile.kernels.state import TEXT, VISION

pytestmark = pytest.mark.usefixtures("poisoned")
UNPACK = unpack_with(torch.ops.apack.unpack)
attend, exactly = attend_with(triton.attend), attend_with(attend_reference.attend)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the launch parameters may be: the usual ones, so few accumulators that values take many passes, nothing kept on chip.
MANY, SEVERAL = {"MAX_ACCUMULATORS": 16 * 32}, {"ONE_WARP_SUMS": 0}
LAUNCHES = {
    "usual": {},
    "many passes": MANY,
    "several warps": SEVERAL,
    "many passes, several warps": MANY | SEVERAL,
    "little shared memory": {"SHARED_BYTES": 256},
}


def moved(state: State, device: torch.device) -> State:
    """The same state elsewhere; what is random stays on the CPU."""
    lists = {name: [x.to(device) for x in getattr(state, name)] for name in ("dense", "codes", "bases", "positions")}
    single = {name: getattr(state, name).to(device) for name in ("key", "value", "cursor")}
    rotated = state.rotated and {**state.rotated, "rotations": [x.to(device) for x in state.rotated["rotations"]]}
    return replace(state, **lists, **single, rotated=rotated)


def littered(state: State, shape: Shape) -> State:
    """The same state with NaN, and bytes that are NaN as float16, wherever no token is; as it is where the reference serves it.

    The reference multiplies what empty slots hold by weights of 0.
    """
    if not triton.serves(state.key, state_of(*state.stored, **state.rotated)):
        return state
    n, held, packed = state.key.shape[2], state.held, int(state.cursor[1])
    dense, codes = [x.clone() for x in state.dense], [x.clone() for x in state.codes]
    ring = torch.ones(shape.tail, dtype=torch.bool)
    ring[torch.arange(packed, max(packed, held - n)) % max(shape.tail, 1)] = False
    for i in range(2):
        dense[i].masked_fill_((state.positions[0] < 0)[:, None, :, None], float("nan"))
        dense[2 + i].masked_fill_(ring[:, None], float("nan"))
    for i in range(len(codes) // 2):
        where = state.positions[1 + i // 2]
        unused = ((where < 0) | (where >= min(packed, held - n)))[:, None, :, None]
        garbage = 0xFF if codes[2 * i].dtype == torch.uint8 else float("nan")
        codes[2 * i].masked_fill_(unused, garbage)
        if codes[2 * i + 1].numel():
            codes[2 * i + 1].masked_fill_(unused[..., 0], float("nan"))
    return replace(state, dense=dense, codes=codes)


def odd_strides(x: Tensor) -> Tensor:
    """The same numbers, heads innermost but one, as a model's projection gives them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@st.composite
def bands(draw, width: int) -> tuple[int, int, int, int]:
    """Components of at most `width`: one band alone, all bands, or none."""
    kind = draw(st.sampled_from(("16", "8", "4", "2", "mixed", "mixed", "none")))
    if kind == "none":
        return (0, 0, 0, 0)
    if kind != "mixed":
        count = draw(st.integers(1, width))
        return tuple(count if kind == bits else 0 for bits in ("16", "8", "4", "2"))
    left, counts = width, []
    for _ in range(4):
        counts.append(draw(st.integers(0, left)))
        left -= counts[-1]
    return tuple(draw(st.permutations(counts)))


@st.composite
def shapes(draw) -> Shape:
    """States of odd sizes, about one block of tokens long."""
    heads, groups = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1), (4, 2))))
    head_dim = draw(st.sampled_from((5, 16, 17, 40, 72)))
    scope, shares = draw(st.sampled_from(("model", "model", "sequence", "as is"))), draw(SHARES)
    return Shape(
        batch=draw(st.sampled_from((1, 2, 3))),
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        laid_out=draw(st.sampled_from((5, 6, 30, 63, 64, 65, 150, 330))),
        spare=30,
        tail=draw(st.sampled_from((0, 1, 7, 64))),
        chunks=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
        bands=tuple(draw(bands(heads // groups * head_dim)) for _ in range(2 * len(shares) + 2)),
        shares=shares,
        scope=scope,
        token_scale=draw(st.booleans()),
        padding=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 10**6)),
        block=draw(st.sampled_from((0, 0, 16, 64, 24))),
    )


@st.composite
def masks(draw, state: State, tokens: int, extent: tuple[int, int, int]) -> Tensor | None:
    """No mask, or a bool or float one, broadcast or with odd strides; some rows may attend nothing."""
    kind = draw(st.sampled_from(("none", "bool", "float", "infinite")))
    if kind == "none":
        return None
    extent = tuple(draw(st.sampled_from((1, full))) for full in extent)
    keep = torch.rand(*extent, tokens, generator=state.generator) < 0.7
    keep[..., :1, :] &= draw(st.booleans())
    mask = keep
    if kind != "bool":
        mask = torch.randn(*extent, tokens, generator=state.generator)
        mask = mask.masked_fill(~keep, float("-inf")) if kind == "infinite" else mask
    return odd_strides(mask) if draw(st.booleans()) else mask


def assert_close_as(own: Tensor, exact: Tensor, plain: Tensor | None, largest: float) -> None:
    """No further from float64 than twice the plain composition, and a few roundings of the largest value."""
    assert own.isfinite().all()
    error = float((own.double() - exact).abs().max())
    allowed = 4 * torch.finfo(own.dtype).eps * largest
    if plain is not None:
        allowed += 2 * float((plain.double() - exact).abs().max())
    assert error <= allowed, (error, allowed)


@settings(max_examples=35, deadline=None)
@given(shapes(), st.data())
@example(Shape(dtype=torch.float32, laid_out=330, head_dim=80, bands=((0, 0, 0, 0),) * 4), None)
@example(Shape(dtype=torch.bfloat16, heads=1, head_dim=256, laid_out=65, bands=((16, 48, 96, 96),) * 4), None)
@example(Shape(dtype=torch.bfloat16, heads=4, head_dim=40, laid_out=330, bands=((8, 32, 32, 32),) * 4, block=64), None)
@example(Shape(dtype=torch.float32, groups=2, head_dim=17, laid_out=150, bands=((2, 3, 3, 2),) * 4, block=16), None)
def test_attend_is_no_further_from_float64_than_attention_over_unpacked_tokens(device, shape, data):
    state = filled(shape)
    n, tokens = state.key.shape[2], state.held
    share, grouped, mask, scale, launch = 2, False, None, None, "usual"
    if data is not None:
        tokens += data.draw(st.integers(0, 3))
        share, grouped = data.draw(st.sampled_from((1, 2, 3))), data.draw(st.booleans())
        scale, launch = data.draw(st.sampled_from((None, 0.3))), data.draw(st.sampled_from(tuple(LAUNCHES)))
    heads, rows = (shape.heads, share * n) if grouped else (shape.heads * share, n)
    query = torch.randn(shape.batch, heads, rows, shape.head_dim, generator=state.generator).to(shape.dtype)
    if data is not None:
        mask = data.draw(masks(state, tokens, (shape.batch, heads, rows)))
    exact = exactly(
        query.double(), state.key.double(), state.value.double(), mask, *state.stored, scale, **state.rotated
    )
    key, value = UNPACK(state.key, state.value, *state.stored, tokens, **state.rotated)
    allowed, added = allowed_by(state, tokens, rows), torch.zeros(())
    if mask is not None:
        allowed = allowed_by(state, tokens, -1)[:, :, :1]
        allowed, added = (allowed & mask, added) if mask.dtype == torch.bool else (allowed, added + mask)
    plain = attention(query, key, value, allowed, added.to(shape.dtype), scale)
    given_state = moved(
        littered(replace(state, key=odd_strides(state.key), value=odd_strides(state.value)), shape), device
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, number in LAUNCHES[launch].items():
            patch.setattr(triton_launch, name, number)
        own = attend(
            odd_strides(query).to(device),
            given_state.key,
            given_state.value,
            None if mask is None else mask.to(device),
            *given_state.stored,
            scale,
            **given_state.rotated,
        )
    assert own.dtype == shape.dtype
    assert_close_as(own.cpu(), exact, plain, float(value.abs().max()))


@settings(max_examples=15, deadline=None)
@given(shapes().filter(lambda shape: shape.shares), st.data())
def test_attend_tiers_reads_what_it_is_told_and_updates_importance(device, shape, data):
    shape = replace(shape, dtype=torch.float32, shares=shape.shares[-1:], bands=shape.bands[-4:])
    state = filled(shape)
    n, share = state.key.shape[2], data.draw(st.sampled_from((1, 3)))
    query = torch.randn(shape.batch, shape.heads * share, n, shape.head_dim, generator=state.generator)
    slots = [state.positions[segment].shape[1] for segment in (VISION, TEXT)]
    read = torch.rand(shape.batch, 2, generator=state.generator).sort(1).values
    tiers = (read * (slots[0] + 1)).to(torch.int32)
    known = [
        torch.rand(shape.batch, count if data.draw(st.booleans()) else 0, generator=state.generator) for count in slots
    ]
    partial = data.draw(st.integers(0, sum(shape.bands[1]) + 1))
    ema = [0.25, 0.75, 1.0, 0.5]
    expected_known = [x.double() for x in known]
    exact = exactly(
        query.double(), state.key.double(), state.value.double(), None, *state.stored, None, *expected_known, tiers, partial, ema,
        **state.rotated,
    )  # fmt: skip
    given_state, own_known = moved(littered(state, shape), device), [x.to(device) for x in known]
    with pytest.MonkeyPatch.context() as patch:
        for name, number in LAUNCHES[data.draw(st.sampled_from(tuple(LAUNCHES)))].items():
            patch.setattr(triton_launch, name, number)
        own = attend(
            query.to(device), given_state.key, given_state.value, None, *given_state.stored, None, *own_known,
            tiers.to(device), partial, ema, **given_state.rotated,
        )  # fmt: skip
    largest = float(
        torch.cat([UNPACK(state.key, state.value, *state.stored, state.held, **state.rotated)[1].flatten()]).abs().max()
    )
    assert_close_as(own.cpu(), exact, None, 4 * largest)
    for got, wanted in zip(own_known, expected_known, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-5, rtol=1e-5)


LENGTHS = (0, 1, 63, 64, 65)


@pytest.mark.parametrize("block", (0, 16, 64))
@pytest.mark.parametrize("shift", range(len(LENGTHS)))
def test_lengths_of_three_packed_segments_around_a_block(device, shift, block, monkeypatch):
    coarse, vision, text = (LENGTHS[(shift + i) % len(LENGTHS)] for i in range(3))
    batch, groups = ((3, 1), (1, 2))[shift % 2]
    bands = ((4, 0, 12, 0), (0, 6, 0, 10), (0, 0, 16, 0), (4, 0, 0, 12), (0, 0, 3, 9), (0, 4, 0, 8))
    case = Case(
        batch=batch, groups=groups, coarse=coarse, vision=vision, text=text, bands=bands, block=block, new=1 + shift % 2, seed=shift
    )  # fmt: skip
    call = build(case)
    clean = without_garbage(call)
    exact = exactly(*clean.copy(torch.float64).arguments, **clean.rotations)
    launch = tuple(LAUNCHES)[(shift + block // 16) % len(LAUNCHES)]
    for name, number in LAUNCHES[launch].items():
        monkeypatch.setattr(triton_launch, name, number)

    def placed(x):
        return [placed(y) for y in x] if isinstance(x, list) else x.to(device) if isinstance(x, Tensor) else x

    own = attend(*map(placed, call.arguments), **{name: placed(x) for name, x in call.rotations.items()})
    assert_close_as(own.cpu(), exact, None, 4 * float(exact.abs().max()))


def launch_of(bands, rows, segments=1, anchor_slots=64):
    """Launch parameters for 16-bit queries of this many rows of a group."""
    shared = triton_launch.shared_bytes(torch.device("cpu"))
    return triton_launch.choose_launch(
        [bands] * segments, [bands] * segments, rows, rows, 64, 2, False, shared, anchor_slots
    )


@pytest.mark.parametrize("anchor_slots", (0, 64))
@pytest.mark.parametrize("count", (16, 64, 128, 192, 256))
def test_three_packed_segments_take_no_more_shared_memory_than_two_may(count, anchor_slots):
    bands, shared = Bands((0, count, count, 0)), triton_launch.shared_bytes(torch.device("cpu"))
    for segments in (2, 3):
        launch = launch_of(bands, 16, segments, anchor_slots)
        latents = 0 if launch.resident else 2 * 2 * count * launch.group_tile
        taken = segments * launch.stages * (launch.block * 2 * bands.token_bytes + latents)
        assert taken <= 2 * shared / triton_launch.programs_per_processor(launch.warps)


def test_a_program_has_as_few_warps_as_its_sums_need():
    few, many = Bands((0, 0, 64, 128)), Bands((0, 96, 256, 160))
    assert [launch_of(few, rows).warps for rows in (9, 17)] == [1, 2]
    assert (launch_of(many, 16).warps, launch_of(many, 16).block) == (4, 64)
    assert launch_of(few, 9).block == 64
    assert launch_of(few, 9, anchor_slots=16).block == 16


def test_rows_are_padded_to_8_or_16_and_wide_bases_take_no_more():
    few, many = Bands((0, 0, 64, 128)), Bands((0, 96, 256, 160))
    assert [launch_of(few, rows).group_tile for rows in (1, 8, 9, 16, 17, 28)] == [16, 16, 16, 16, 32, 32]
    assert [launch_of(many, rows).group_tile for rows in (1, 8, 9, 28)] == [8, 8, 16, 16]


def test_many_heads_share_one_wide_basis(device):
    wide = ((16, 32, 64, 128), (0, 0, 256, 0), (0, 0, 0, 640), (64, 0, 0, 0))
    shape = Shape(batch=1, heads=8, head_dim=128, laid_out=150, chunks=(1,), bands=wide, dtype=torch.bfloat16)
    state = filled(shape)
    query = torch.randn(1, 56, 1, 128, generator=state.generator).to(shape.dtype)
    exact = exactly(query.double(), state.key.double(), state.value.double(), None, *state.stored, None)
    key, value = UNPACK(state.key, state.value, *state.stored, state.held)
    plain = attention(query, key, value, allowed_by(state, state.held, 1), 0.0, None)
    there = moved(littered(state, shape), device)
    own = attend(query.to(device), there.key, there.value, None, *there.stored, None)
    assert_close_as(own.cpu(), exact, plain, float(value.abs().max()))


@pytest.mark.parametrize("factor", (1e-30, 1e4, 1e30))
def test_float16_latents_neither_overflow_nor_vanish(device, factor):
    shape = Shape(dtype=torch.bfloat16, bands=((2, 3, 3, 2),) * 4, laid_out=80)
    state = filled(shape)
    query = torch.randn(2, 4, 1, 5, generator=state.generator).to(shape.dtype) * factor
    exact = exactly(query.double(), state.key.double(), state.value.double(), None, *state.stored, 1 / factor)
    there = moved(state, device)
    own = attend(query.to(device), there.key, there.value, None, *there.stored, 1 / factor)
    value = UNPACK(state.key, state.value, *state.stored, state.held)[1]
    assert_close_as(own.cpu(), exact, None, float(value.abs().max()))


def test_float64_goes_to_the_reference(device):
    state = moved(filled(Shape()), device)
    query = torch.randn(2, 4, 1, 5, dtype=torch.float64, device=device)
    arguments = (query, state.key, state.value, None, *state.stored, None)
    assert torch.equal(attend(*arguments), exactly(*arguments))


@pytest.mark.parametrize(
    "block, scope, served",
    ((16, "model", True), (64, "model", True), (24, "model", False), (8, "model", False), (64, "as is", False)),
)
def test_relative_keys_are_served_where_they_are_packed_and_tiles_share_an_anchor(block, scope, served):
    state = filled(Shape(block=block, scope=scope, dtype=torch.float32))
    query = torch.zeros(2, 4, 1, 5)
    assert triton.serves(query, state_of(*state.stored, **state.rotated)) == served
    assert triton.serves(query, state_of(*state.stored))


@pytest.mark.parametrize("name", ("append", "attend", "attend_tiers"))
def test_cuda_tensors_have_kernels_of_their_own(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"apack::{name}", "CUDA")
