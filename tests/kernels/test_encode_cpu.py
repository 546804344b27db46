"""The compiled encode of CPUs: each code is the nearest level to the token's coefficient in float64, up to float32's rounding."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.encode import cpu, encode
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

pytestmark = [
    pytest.mark.skipif(native.COMPILED is None, reason=f"the compiled operations are {native.STATUS}"),
    pytest.mark.usefixtures("poisoned"),
]

SETS = native.SETS
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """Tokens and a basis; `shared`: one basis for all rows."""

    batch: int = 1
    groups: int = 1
    tokens: int = 65
    width: int = 48
    bands: tuple[int, int, int, int] = (3, 5, 7, 9)
    shared: bool = True
    token_scale: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0


def build(case: Case) -> tuple[Tensor, StreamBasis, Bands]:
    """Random tokens, some of them large, and a random basis; a step is about a twentieth to all of a coefficient."""
    g = torch.Generator().manual_seed(case.seed)
    bands = Bands(case.bands).at_most(case.width)
    size, kind = (1 if case.shared else case.batch, case.groups), torch.float32 if case.shared else torch.float16
    rows = torch.linalg.qr(torch.randn(*size, case.width, case.width, generator=g)).Q[:, :, : bands.components]
    units = {16: 1.0, 8: 0.03, 4: 0.3, 2: 1.0}
    step = torch.tensor([units[bits] for bits in bands.widths]) * (
        torch.rand(*size, bands.components, generator=g) + 0.5
    )
    basis = StreamBasis(torch.randn(*size, case.width, generator=g).to(kind), rows.contiguous().to(kind), step)
    x = torch.randn(case.batch, case.groups, case.tokens, case.width, generator=g)
    x = x * (1 + 9 * (torch.rand(case.batch, case.groups, case.tokens, 1, generator=g) < 0.1))
    return x.to(case.dtype), basis, bands


def assert_nearest_levels(x: Tensor, basis: StreamBasis, bands: Bands, codes: Tensor, scale: Tensor) -> None:
    """What `codes` stand for, against the coefficients in float64."""
    exact = StreamBasis(*(tensor.double() for tensor in basis))
    levels = project(x.double(), exact) / exact.step[:, :, None]
    # of a sum of W products in float32, with a margin of 4 (Higham and Mary, 2019)
    rounding = (x.double().square().sum(-1) + exact.mean.square().sum(-1)[:, :, None]).sqrt()[..., None]
    rounding = 4 * EPSILON * x.shape[-1] ** 0.5 * rounding / exact.step[:, :, None]
    if scale.numel():
        wanted = token_scales(project(x.double(), exact), exact.step, bands)
        assert ((scale.double() - wanted.double()).abs() <= wanted.double() * 2.0**-10).all()
        levels, rounding = (y / scale.double()[..., None] for y in (levels, rounding))
    found = centered_levels(codes, bands, torch.float64)
    bits = torch.tensor(bands.widths, dtype=torch.float64)
    reach = torch.where(bits < 16, (2.0**bits - 1) / 2, FLOAT16_MAX)
    clipped = torch.minimum(torch.maximum(levels, -reach), reach)
    unit = torch.where(bits < 16, 1.0, 2.0**-10 * clipped.abs() + 2.0**-24)
    assert ((found - clipped).abs() <= unit * (0.5 + 1e-3) + rounding).all()


@st.composite
def cases(draw) -> Case:
    count = st.integers(0, 40)
    return Case(
        batch=draw(st.sampled_from((1, 3))),
        groups=draw(st.sampled_from((1, 2))),
        tokens=draw(st.sampled_from((0, 1, 63, 64, 65, 200))),
        width=draw(st.sampled_from((1, 5, 48, 66, 192))),
        bands=draw(st.tuples(count, count, count, count)),
        shared=draw(st.booleans()),
        token_scale=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        seed=draw(st.integers(0, 10**6)),
    )


def encode_over_nan(x: Tensor, basis: StreamBasis, bands: Bands, token_scale: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of an encode whose scratch memory held NaN before."""
    cpu.encode(torch.full_like(x, float("nan")), basis, bands, token_scale)
    return cpu.encode(x, basis, bands, token_scale)


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_each_code_is_the_nearest_level(instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)

    @settings(max_examples=100, deadline=None)
    @given(cases())
    @example(Case(bands=(0, 0, 0, 0)))
    def check(case: Case) -> None:
        x, basis, bands = build(case)
        codes, scale = encode_over_nan(x, basis, bands, case.token_scale)
        wanted_codes, wanted_scale = quantize(project(x, basis), basis.step, bands, case.token_scale)
        assert codes.shape == wanted_codes.shape and codes.dtype == torch.uint8
        assert scale.shape == wanted_scale.shape and scale.dtype == torch.float16
        assert_nearest_levels(x, basis, bands, codes, scale)

    check()


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_wide_streams_are_projected_in_pieces_by_several_threads(threads, instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, basis, bands = build(Case(tokens=300, width=1100, bands=(16, 20, 100, 333)))
        assert_nearest_levels(x, basis, bands, *cpu.encode(x, basis, bands, True))
    finally:
        torch.set_num_threads(before)


def test_strides_do_not_matter():
    x, basis, bands = build(Case(batch=2, groups=2))
    wide = x.new_zeros(2, 2, 2 * x.shape[2], 3 * x.shape[3])
    wide[:, :, ::2, ::3] = x
    for view in (wide[:, :, ::2, ::3], x.transpose(1, 2).contiguous().transpose(1, 2)):
        for got, wanted in zip(cpu.encode(view, basis, bands, True), cpu.encode(x, basis, bands, True), strict=True):
            assert torch.equal(got, wanted)


def test_padding_inside_a_byte_is_zero():
    x, basis, bands = build(Case(bands=(0, 0, 3, 5)))
    codes, _ = cpu.encode(x, basis, bands, True)
    assert not (codes[..., 1] >> 4).any() and not (codes[..., 3] >> 2).any()
    assert WIDTHS == (16, 8, 4, 2) and codes.shape[-1] == 4


def test_encode_is_compiled_for_what_it_serves(monkeypatch):
    x, basis, bands = build(Case())
    called = []
    compiled = cpu.encode
    monkeypatch.setattr(cpu, "encode", lambda *arguments: called.append(1) or compiled(*arguments))
    encode(x, basis, bands, True)
    assert called
    encode(x.double(), basis, bands, True)
    assert len(called) == 1
    monkeypatch.setattr(cpu, "COMPILED", None)
    codes, scale = encode(x, basis, bands, True)
    assert len(called) == 1
    assert_nearest_levels(x, basis, bands, codes, scale)
