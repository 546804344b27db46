"""What integer dot products add to an attention over codes, beside what the codes themselves lost."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from precision import WITH_BFLOAT16
from random_calls import Case, build, cases
from state_lists import attend_with, state_of
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.attend import cpu, reference
from apack_compile.kernels.format import BANDS, Bands, StreamBasis, quantize
from apack_compile.kernels.state import PackedState

SETS = [i for i in native.SETS if native.has_integers(i)]
pytestmark = pytest.mark.skipif(native.COMPILED is None or not SETS, reason="no integer dot products here")
# without products of bfloat16, with them, and with both in matrix registers
AVX512 = [native.INSTRUCTION_SETS.index(name) for name in ("avx512_vnni", "avx512_vnni_bf16", "avx512_amx")]
SDPA = torch.nn.functional.scaled_dot_product_attention
HEADS, WIDTH = 2, 64


@dataclass(frozen=True)
class Tokens:
    """Text tokens of Gaussian components, whose deviations fall by `decay` from the first to the last.

    sharpness: deviation of the scores. drift: how far from the mean of the basis tokens lie, in deviations.
    """

    bands: tuple[int, int, int, int]
    count: int = 300
    decay: float = 0.1
    sharpness: float = 2.0
    drift: float = 0.0
    outlier: float = 1.0
    share: int = 3
    block: int = 0
    token_scale: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Attention:
    """A query over packed tokens; keys and values that were packed, what was decoded of them, both as heads `[1, H, N, D]`."""

    query: Tensor
    state: PackedState
    exact: tuple[Tensor, Tensor]


def built(tokens: Tokens) -> Attention:
    g = torch.Generator().manual_seed(tokens.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    bands, width = Bands(tokens.bands), HEADS * WIDTH
    deviation = torch.logspace(0, torch.tensor(tokens.decay).log10(), bands.components, dtype=torch.float64)
    unit = torch.tensor([band.step for band in bands.each], dtype=torch.float64)
    codes, bases, exact = [], [], []
    for _ in range(2):
        # what is lost is what quantizing loses: there are no other components
        rows = torch.linalg.qr(normal(width, bands.components)).Q.mT[None, None]
        step = (deviation * unit)[None, None]
        basis = StreamBasis(normal(1, 1, width).float() * 0.1, rows.float(), step.float())
        own = (
            normal(1, 1, tokens.count, bands.components) + tokens.drift * normal(bands.components).sign()
        ) * deviation
        packed = quantize(own.float(), basis.step, bands, tokens.token_scale)
        codes += packed
        bases += basis
        states = own @ basis.decoder.double() + basis.mean.double()[:, :, None]
        exact.append(states.unflatten(-1, (HEADS, WIDTH)).squeeze(1).transpose(1, 2))
    blocks = tokens.count // max(tokens.block, 1) + 1
    angles = normal(1, blocks, WIDTH // 4).float()
    rotations = [torch.stack([angles.cos(), angles.sin()], 2)] if tokens.block else None
    if rotations:
        turns = rotations[0].double()[0, torch.arange(tokens.count) // tokens.block][None]
        exact[0] = rotated(exact[0], turns)
    position = torch.arange(tokens.count, dtype=torch.int32)[None]
    nothing = [torch.zeros(1, HEADS, 0, WIDTH)] * 4
    cursor = torch.tensor([tokens.count + 1, tokens.count, 0])
    state = state_of(
        nothing, codes, bases, [*tokens.bands] * 2, [position[:, :0], position], cursor, rotations, tokens.block
    )
    query = normal(1, HEADS * tokens.share, 1, WIDTH)
    query[..., 0] *= tokens.outlier
    score = query.unflatten(1, (HEADS, -1)).flatten(2, 3) @ exact[0].mT
    query *= tokens.sharpness / (score - score.mean(-1, keepdim=True)).square().mean().sqrt().clamp_min(1e-3)
    return Attention(query.float(), state, (exact[0], exact[1]))


def rotated(keys: Tensor, rotations: Tensor) -> Tensor:
    """Keys `[1, H, N, D]` rotated forward by `[1, N, 2, P]`."""
    cosine, sine = rotations[:, None].unbind(3)
    pairs = cosine.shape[-1]
    first, second = keys[..., :pairs], keys[..., pairs : 2 * pairs]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, keys[..., 2 * pairs :]], -1)


def dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention in float64."""
    grouped = query.double().unflatten(1, (HEADS, -1)).flatten(2, 3)
    return ((grouped @ keys.double().mT).softmax(-1) @ values.double()).reshape(*query.shape)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).square().mean().sqrt())


def errors(tokens: Tokens, instructions: int) -> tuple[float, float, float]:
    """Root mean squares: what an instruction set adds, what the codes lost, what dense attention in bfloat16 loses."""
    made = built(tokens)
    none = torch.zeros(1, HEADS, 0, WIDTH)
    arguments = (none, none, None, *made.state.flatten(), 1.0)
    coded = reference.attend(made.query.double(), *arguments)
    exact = dense(made.query, *made.exact)
    short = SDPA(*(x.bfloat16() for x in (made.query, *made.exact)), scale=1.0, enable_gqa=True)
    got = cpu.attend(made.query, *arguments, instructions=instructions)
    return error(got, coded), error(coded, exact), error(short, exact)


COUNT = st.integers(0, 32)


@st.composite
def some_tokens(draw) -> Tokens:
    return Tokens(
        bands=draw(st.tuples(COUNT, COUNT, COUNT, COUNT).filter(any)),
        count=draw(st.sampled_from((1, 63, 65, 300, 1100))),
        decay=draw(st.sampled_from((1.0, 0.1, 0.01))),
        sharpness=draw(st.sampled_from((0.01, 0.5, 2.0, 8.0))),
        drift=draw(st.sampled_from((0.0, 0.0, 2.0))),
        outlier=draw(st.sampled_from((1.0, 1.0, 30.0))),
        share=draw(st.sampled_from((1, 3, 7))),
        block=draw(st.sampled_from((0, 16, 64))),
        token_scale=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_integers_add_a_tenth_of_what_the_codes_lost_or_less_than_bfloat16(instructions):
    with_bfloat16 = native.INSTRUCTION_SETS[instructions] in WITH_BFLOAT16

    @settings(max_examples=60, deadline=None)
    @given(some_tokens())
    # one token has nearly all of the weight, and many with the same mean have little each
    @example(Tokens((0, 0, 64, 0), count=1100, sharpness=8.0, drift=3.0))
    @example(Tokens((0, 0, 0, 64), count=1100, sharpness=8.0, drift=3.0))
    # latents of very different size in one row
    @example(Tokens((0, 64, 0, 0), decay=0.001, outlier=100.0))
    @example(Tokens((0, 30, 30, 60), decay=0.001, outlier=100.0))
    # found by chance where most codes were short, but not three quarters
    @example(Tokens((13, 30, 32, 32), count=63, decay=0.01, share=7, block=16, token_scale=False, seed=20))
    # found by chance with weights of one byte, which would add 0.47 of what the codes lost
    @example(Tokens((0, 0, 1, 0), count=63, sharpness=0.5, share=7, seed=139196))
    # keys of nothing but bytes: queries are not rounded to bfloat16
    @example(Tokens((0, 64, 0, 0), count=1100, block=16))
    # the same: few tokens have nearly all of the weight
    @example(Tokens((0, 1, 27, 17), count=1100, sharpness=8.0, outlier=30.0, share=1, token_scale=False, seed=448313))
    @example(Tokens((21, 0, 29, 0), count=1100, decay=0.01, sharpness=8.0, share=1, block=64, seed=866699))
    @example(Tokens((0, 0, 23, 3), count=1100, sharpness=8.0, outlier=30.0, share=7, block=16, seed=386))
    def check(tokens: Tokens) -> None:
        added, lost, short = errors(tokens, instructions)
        assert added <= max(lost / 10, short if with_bfloat16 else short / 10)

    check()


@pytest.mark.parametrize("bands", ((16, 0, 0, 0), (0, 64, 0, 0), (8, 12, 30, 20)), ids=str)
@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_integers_add_next_to_nothing_where_a_quarter_of_the_codes_is_long(bands, instructions):
    added, lost, short = errors(Tokens(bands, count=1100, block=16), instructions)
    assert added <= min(lost, short) / 20


@pytest.mark.skipif(len({*AVX512} & {*SETS}) < 2, reason="no products of bfloat16 here")
@pytest.mark.parametrize("bands", ((16, 0, 0, 0), (0, 64, 0, 0), (8, 12, 30, 20)), ids=str)
def test_queries_are_rounded_to_bfloat16_only_where_three_quarters_of_the_codes_are_short(bands):
    made = built(Tokens(bands, count=1100, block=16))
    arguments = (*[torch.zeros(1, HEADS, 0, WIDTH)] * 2, None, *made.state.flatten(), 1.0)
    got = [cpu.attend(made.query, *arguments, instructions=instructions) for instructions in {*AVX512} & {*SETS}]
    assert all(torch.equal(x, got[0]) for x in got)


@pytest.mark.skipif(AVX512[2] not in SETS, reason="no matrix registers here")
def test_matrix_registers_give_the_same_integers():
    @settings(max_examples=60, deadline=None)
    @given(cases())
    # more rows than a register has, whose number it does not divide; columns in several tiles, the last one short
    @example(Case(heads=5, share=7, new=2, text=130, bands=((0, 0, 0, 8),) * 2 + ((0, 33, 70, 40),) * 2, grouped=True))
    @example(Case(heads=8, head_dim=64, value_dim=64, text=65, bands=((0, 0, 0, 8),) * 2 + ((0, 0, 400, 90),) * 2))
    def check(case: Case) -> None:
        call = build(replace(case, block=0))
        got = [attend_with(partial(cpu.attend, instructions=i))(*call.copy().arguments) for i in (AVX512[0], AVX512[2])]
        assert torch.equal(*got)

    check()


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_weights_that_are_small_but_many_lose_nothing(instructions):
    """All tokens but one have the same value, and each a 600th of its weight: less than half of what a byte can hold."""
    components, count = 64, 1024
    bands = [0, 0, components // 2, components // 2]
    basis = StreamBasis(torch.zeros(1, 1, components), torch.eye(components)[None, None], torch.ones(1, 1, components))
    nothing, position = [torch.zeros(1, 1, 0, components)] * 4, torch.arange(count, dtype=torch.int32)[None]
    codes = torch.full((1, 1, count, components // 4 + components // 8), 255, dtype=torch.uint8)
    keys = codes.clone()
    codes[:, :, 0] = keys[:, :, 1:] = 0
    scale = torch.empty(0, dtype=torch.float16)
    cursor = torch.tensor([count + 1, count, 0])
    state = state_of(nothing, [keys, scale, codes, scale], [*basis] * 2, bands * 2, [position[:, :0], position], cursor)
    query = torch.full((1, 1, 1, components), 600.0).log() / (components / 2 * (15 + 3))
    none = torch.zeros(1, 1, 0, components)
    arguments = (none, none, None, *state.flatten(), 1.0)
    expected = reference.attend(query.double(), *arguments)
    assert expected[..., 0] > 1
    got = cpu.attend(query, *arguments, instructions=instructions)
    torch.testing.assert_close(got.double(), expected, atol=0.005, rtol=0.003)


@pytest.mark.parametrize("bits", (8, 4, 2))
@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_sums_of_the_largest_levels_and_numbers_do_not_overflow(instructions, bits):
    components, count, middle = 600, 70, (2**bits - 1) / 2
    basis = StreamBasis(torch.zeros(1, 1, 1), torch.ones(1, 1, components, 1), torch.ones(1, 1, components))
    codes = torch.full((1, 1, count, components * bits // 8), 255, dtype=torch.uint8)
    stream = codes, torch.empty(0, dtype=torch.float16)
    nothing, position = [torch.zeros(1, 1, 0, 1)] * 4, torch.arange(count, dtype=torch.int32)[None]
    cursor = torch.tensor([count + 1, count, 0])
    bands = [components if band.bits == bits else 0 for band in BANDS]
    state = state_of(nothing, [*stream] * 2, [*basis] * 2, bands * 2, [position[:, :0], position], cursor)
    query = torch.tensor([1e-5, -1e-5])[None, :, None, None]
    none = torch.zeros(1, 1, 0, 1)
    arguments = (none, none, None, *state.flatten(), 1.0)
    got = cpu.attend(query, *arguments, instructions=instructions)
    torch.testing.assert_close(got, torch.full_like(got, middle * components), atol=0, rtol=1e-4)
    # with keys that differ: half of the tokens have the least levels, and all of the weight goes to the others, or to them
    codes[:, :, ::2] = 0
    got = cpu.attend(query * 1e5, *arguments, instructions=instructions)
    torch.testing.assert_close(
        got, torch.tensor([middle, -middle])[None, :, None, None] * components, atol=0, rtol=1e-4
    )
