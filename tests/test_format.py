"""Properties of the format and of the basis fit."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import (
    BANDS,
    FLOAT16_MAX,
    WIDTHS,
    Bands,
    StreamBasis,
    band_bytes,
    decode,
    pack_levels,
    project,
    unpack_levels,
)
from apack_compile.plan import basis as basis_module
from apack_compile.plan.basis import BAND_GRAIN, fit, fit_steps, hadamard, mixed, moments, principal_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("gaussian", "constant", "zero", "zero variance", "outlier", "rank one")


def error_bound(x: torch.Tensor, basis: StreamBasis, bands: Bands, token_scale: bool = False) -> torch.Tensor:
    """Largest norm `[B, G, N]` of `decode(encode(x)) - x` that the format allows, float64.

    Half a step per integer component inside its range, the clipped excess outside it, half a unit in the last place of the
    float16 band, and the energy of the dropped components. Assumes orthonormal decoder rows. Rounded up: a token of zeros reaches it.
    """
    exact = StreamBasis(*(tensor.double() for tensor in basis))
    centered = x.double() - exact.mean[:, :, None]
    coefficients = centered @ exact.decoder.mT
    dropped = (centered.square().sum(-1) - coefficients.square().sum(-1)).clamp_min(0)
    unit = exact.step[:, :, None].expand_as(coefficients)
    if token_scale and bands.components:
        unit = unit * encode(x, basis, bands, True)[1].double()[..., None]
    bits = torch.tensor(bands.widths, device=x.device)
    reach = torch.where(bits == 16, FLOAT16_MAX, (2.0**bits - 1) / 2) * unit
    rounding = torch.where(bits == 16, coefficients.abs() * 2.0**-11 + unit * 2.0**-25, unit / 2)
    excess = (coefficients.abs() - reach).clamp_min(0)
    upwards = 1 + torch.finfo(torch.float64).eps * x.shape[-1]
    return upwards * ((rounding + excess).square().sum(-1) + dropped).sqrt()


def tokens_like(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Tokens `[S, G, N, W]` of one kind, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.logspace(0, -3, shape[-1])
    if kind == "constant":
        return torch.full(shape, 3.25)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "zero variance":
        return x[:, :, :1].expand(shape).clone()
    if kind == "outlier":
        x[:, :, 0] += 5e4
    if kind == "rank one":
        return x[..., :1] * torch.randn(shape[-1], generator=generator)
    return x


@st.composite
def bands_within(draw, width: int) -> Bands:
    """Bands of at most `width` components."""
    left, counts = width, []
    for _ in WIDTHS:
        counts.append(draw(st.integers(0, left)))
        left -= counts[-1]
    return Bands(tuple(draw(st.permutations(counts))))


@st.composite
def streams(draw):
    """Tokens to fit, tokens to code, bands and whether tokens have a scale."""
    width = draw(st.sampled_from((1, 3, 16, 37)))
    sequences, groups = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 3)))
    fitted, coded = draw(st.sampled_from((1, 2, 9, 60))), draw(st.sampled_from((1, 7, 33)))
    seed = draw(st.integers(0, 10**6))
    known = tokens_like(draw(st.sampled_from(KINDS)), (sequences, groups, fitted, width), seed)
    x = tokens_like(draw(st.sampled_from(KINDS)), (sequences, groups, coded, width), seed + 1)
    return known, x.to(draw(st.sampled_from(DTYPES))), draw(bands_within(width)), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 41), seed=st.integers(0, 1000))
def test_levels_survive_packing_at_any_width_and_count(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 2**bits, (2, 3, count), generator=generator, dtype=torch.uint8)
    packed = pack_levels(levels, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == band_bytes(count, bits)
    assert torch.equal(unpack_levels(packed, bits, count), levels)


def test_the_first_component_has_the_lowest_bits_of_its_byte():
    assert pack_levels(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00111001, 0b10]
    assert pack_levels(torch.tensor([5, 10, 15]), 4).tolist() == [0xA5, 0x0F]


@settings(max_examples=50, deadline=None)
@given(streams())
def test_codes_take_exactly_the_bytes_the_bands_say(stream):
    known, x, bands, token_scale = stream
    codes, scale = encode(x, fit(moments(known)).basis(bands), bands, token_scale)
    assert codes.dtype == torch.uint8
    assert codes.nbytes == bands.token_bytes * x[..., 0].numel()
    assert scale.nbytes == (2 * x[..., 0].numel() if token_scale and bands.components else 0)
    assert codes.untyped_storage().nbytes() == codes.nbytes


ZEROS = torch.zeros(1, 1, 1, 16)


@settings(max_examples=60, deadline=None)
@given(streams())
@example((ZEROS, ZEROS, Bands((0, 3, 0, 4)), False))
def test_a_decoded_token_is_within_the_error_bound(stream):
    known, x, bands, token_scale = stream
    basis = fit(moments(known)).basis(bands)
    codes, scale = encode(x, basis, bands, token_scale)
    decoded = decode(codes, scale, basis, bands, torch.float64)
    error = (decoded - x.double()).norm(dim=-1)
    # float32 arithmetic and rows that are orthonormal in float32 only
    rounding = (
        torch.finfo(torch.float32).eps * 16 * (x.double().norm(dim=-1) + basis.mean.double().norm(dim=-1)[:, :, None])
    )
    assert torch.isfinite(decoded).all()
    assert (error <= error_bound(x, basis, bands, token_scale) + rounding).all()


def test_the_error_bound_is_of_the_size_of_the_error():
    x = tokens_like("gaussian", (1, 1, 500, 32), 0)
    for counts in ((32, 0, 0, 0), (0, 32, 0, 0), (0, 0, 32, 0), (8, 8, 8, 0)):
        bands = Bands(counts)
        basis = fit(moments(x)).basis(bands)
        error = (decode(*encode(x, basis, bands), basis, bands, torch.float64) - x.double()).norm(dim=-1)
        assert error_bound(x, basis, bands).mean() < 4 * error.mean()


def test_more_bits_bring_a_smaller_error():
    x = tokens_like("gaussian", (1, 2, 400, 24), 3)
    errors = []
    for band in range(4):
        bands = Bands(tuple(24 if i == band else 0 for i in range(4)))
        basis = fit(moments(x)).basis(bands)
        errors.append(float((decode(*encode(x, basis, bands), basis, bands) - x).norm() / x.norm()))
    assert errors[0] < 1e-3 and errors == sorted(errors)
    # squared error of an optimal 2-bit and 4-bit quantizer of a Gaussian, with some room for the sample
    assert errors[3] ** 2 < 1.3 * 0.119 and errors[2] ** 2 < 1.3 * 0.0115


def test_values_past_the_range_of_float16_are_clipped_not_infinite():
    bands = Bands((2, 0, 0, 0))
    basis = StreamBasis(torch.zeros(1, 1, 2), torch.eye(2)[None, None], torch.full((1, 1, 2), 1e-3))
    x = torch.tensor([[[[1e6, -1e30]]]])
    decoded = decode(*encode(x, basis, bands), basis, bands)
    torch.testing.assert_close(decoded, torch.tensor([[[[FLOAT16_MAX * 1e-3, -FLOAT16_MAX * 1e-3]]]]))


def test_a_token_encoded_alone_has_the_codes_it_has_in_a_batch():
    bands = Bands((0, 5, 13, 19))
    x = tokens_like("gaussian", (2, 2, 301, 37), 5)
    basis = fit(moments(x)).basis(bands)
    codes, _ = encode(x, basis, bands)
    alone = [encode(x[:, :, i : i + 1], basis, bands)[0] for i in range(x.shape[2])]
    assert torch.equal(torch.cat(alone, dim=2), codes)


@pytest.mark.parametrize("counts", ((1, 0, 0, 1), (2, 3, 0, 0), (3, 0, 5, 1)), ids=str)
def test_one_token_of_an_odd_number_of_bytes_decodes_like_the_batch_it_was_in(counts):
    bands = Bands(counts)
    x = tokens_like("gaussian", (1, 1, 5, 12), 6)
    basis = fit(moments(x)).basis(bands)
    codes, scale = encode(x, basis, bands)
    together = decode(codes, scale, basis, bands)
    for i in range(5):
        torch.testing.assert_close(decode(codes[:, :, i : i + 1], scale, basis, bands)[:, :, 0], together[:, :, i])


def test_a_half_precision_band_encoded_alone_is_within_one_unit_in_the_last_place_of_the_batch():
    # a matrix product of one row may round differently in float32, which a float16 near a tie shows
    bands = Bands((9, 0, 0, 0))
    x = tokens_like("gaussian", (2, 2, 301, 37), 5)
    basis = fit(moments(x)).basis(bands)
    codes, scale = encode(x, basis, bands, token_scale=True)
    alone, alone_scale = zip(*(encode(x[:, :, i : i + 1], basis, bands, True) for i in range(x.shape[2])), strict=True)
    torch.testing.assert_close(torch.cat(alone_scale, dim=2), scale, rtol=2**-10, atol=0)
    apart, together = (
        decode(c, s, basis, bands) for c, s in ((torch.cat(alone, 2), torch.cat(alone_scale, 2)), (codes, scale))
    )
    torch.testing.assert_close(apart, together, rtol=0, atol=2**-10 * float(x.abs().max()))
    assert (torch.cat(alone, dim=2) != codes).float().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_identity_basis_returns_the_tokens(dtype):
    empty = torch.empty(0)
    identity = StreamBasis(empty, empty, empty)
    x = tokens_like("outlier", (2, 1, 9, 5), 1).to(dtype)
    codes, scale = encode(x, identity, Bands(), token_scale=True)
    assert scale.numel() == 0
    assert torch.equal(decode(codes, scale, identity, Bands(), dtype), x)


@settings(max_examples=40, deadline=None)
@given(streams())
def test_basis_rows_are_orthonormal_and_steps_positive(stream):
    known, _, _, _ = stream
    spectrum = fit(moments(known))
    gram = spectrum.rows.double() @ spectrum.rows.double().mT
    torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).double().expand_as(gram), atol=2e-5, rtol=0)
    assert all((step > 0).all() and torch.isfinite(step).all() for step in map(spectrum.steps, BANDS))
    assert (spectrum.deviation.diff(dim=-1) <= 0).all()


def test_the_mean_is_removed_before_projection():
    x = tokens_like("gaussian", (1, 2, 200, 12), 8)
    shift = torch.linspace(-50, 50, 12)
    bands = Bands((0, 0, 12, 0))
    near, far = (fit(moments(y)).basis(bands) for y in (x, x + shift))
    torch.testing.assert_close(far.mean - near.mean, shift.expand(1, 2, -1), atol=1e-3, rtol=0)
    assert project(x + shift, far).mean(2).abs().max() < 1e-3
    error = (decode(*encode(x + shift, far, bands), far, bands) - x - shift).norm()
    assert error < 1.1 * (decode(*encode(x, near, bands), near, bands) - x).norm()


def test_tokens_of_weight_zero_never_enter_the_fit():
    x = tokens_like("gaussian", (2, 1, 40, 9), 2)
    weight = (torch.arange(40) >= torch.tensor([[7], [0]])).float()
    other = x.clone()
    other[0, :, :7] = 1e4
    for field, changed in zip(vars(moments(x, weight)).values(), vars(moments(other, weight)).values(), strict=True):
        assert torch.equal(field, changed)
    expected = moments(x[:1, :, 7:])
    torch.testing.assert_close(moments(other, weight).covariance[:1], expected.covariance)


def test_more_components_than_tokens_still_decode_every_token():
    x = tokens_like("gaussian", (1, 1, 3, 20), 4)
    bands = Bands((20, 0, 0, 0))
    basis = fit(moments(x), rank=20).basis(bands)
    torch.testing.assert_close(decode(*encode(x, basis, bands), basis, bands), x, atol=2e-3, rtol=2e-3)


def falling_covariance(width: int, rotated: float, seed: int) -> torch.Tensor:
    """Covariance `[1, 2, W, W]` in float64 with the spectrum of text's keys, its directions `rotated` a little; the same ones at 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(2, width, width, generator=generator, dtype=torch.float64)).Q
    noise = torch.randn(2, width, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rows = torch.linalg.qr(rows + rotated / width**0.5 * noise).Q
    variance = (1 + 24 * torch.arange(width, dtype=torch.float64) / width) ** -2.2
    return (rows * variance @ rows.mT)[None]


@pytest.mark.parametrize(
    ("width", "rank", "warm"),
    ((261, 17, False), (389, 64, False), (515, 1, False), (131, 33, True), (193, 64, True), (515, 1, True)),
)
def test_subspace_iteration_loses_little_more_than_the_float64_eigenvectors(width, rank, warm, monkeypatch):
    decomposed, eigen = [], basis_module.symmetric_eigen
    monkeypatch.setattr(basis_module, "symmetric_eigen", lambda x: decomposed.append(x.shape[-1]) or eigen(x))
    covariance = falling_covariance(width, 0.05, 3)
    exact = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[..., :rank].mT
    earlier = torch.linalg.eigh(falling_covariance(width, 0.0, 3)).eigenvectors.flip(-1)[..., :rank].mT
    start = earlier.half() if warm else None
    rows, values = principal_rows(covariance.float(), rank, start)
    assert decomposed == [rank + basis_module.OVERSAMPLING]
    assert rows.shape == exact.shape and rows.dtype == torch.float32
    identity = torch.eye(rank).expand(1, 2, -1, -1)
    torch.testing.assert_close(rows @ rows.mT, identity, atol=2e-5, rtol=0)
    energy = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)

    def lost(r: torch.Tensor) -> torch.Tensor:
        return energy - (r.double() @ covariance @ r.double().mT).diagonal(dim1=-2, dim2=-1).sum(-1)

    assert (lost(rows) <= 1.02 * lost(exact)).all()
    torch.testing.assert_close(values.double().sum(-1), energy - lost(rows), rtol=1e-4, atol=0)


def test_an_earlier_basis_serves_better_than_as_many_iterations_from_random_rows(monkeypatch):
    covariance = falling_covariance(389, 0.05, 3).float()
    before = torch.linalg.eigh(falling_covariance(389, 0.0, 3)).eigenvectors.flip(-1)[..., :64].mT
    monkeypatch.setattr(basis_module, "SUBSPACE_ITERATIONS", basis_module.WARM_ITERATIONS)
    warm, cold = (principal_rows(covariance, 64, start)[1].sum() for start in (before, None))
    assert warm > cold


@pytest.mark.parametrize("token_scale", (False, True))
def test_fitted_steps_serve_the_sample_no_worse_than_gaussian_ones(token_scale):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 800, 16, generator=generator) * torch.randn(1, 1, 800, 1, generator=generator).exp()
    plain = fit(moments(x))
    fitted = fit_steps(plain, x, token_scale)
    for band in (1, 2, 3):
        bands = Bands(tuple(16 if i == band else 0 for i in range(4)))
        before, after = (
            (decode(*encode(x, s.basis(bands), bands), s.basis(bands), bands) - x).square().sum()
            for s in (plain, fitted)
        )
        assert token_scale or after <= before * (1 + 1e-5)
        assert fitted.steps(BANDS[band]).shape == plain.deviation.shape


def test_a_token_scale_serves_tokens_of_very_different_size():
    x = tokens_like("gaussian", (1, 1, 300, 16), 9)
    size = torch.logspace(-2, 2, 300)[:, None]
    bands = Bands((0, 0, 16, 0))
    basis = fit(moments(x)).basis(bands)

    def relative_error(token_scale: bool) -> torch.Tensor:
        y = x * size + basis.mean[:, :, None]
        decoded = decode(*encode(y, basis, bands, token_scale), basis, bands)
        return (decoded - y).norm(dim=-1) / (y - basis.mean[:, :, None]).norm(dim=-1)

    assert relative_error(True).median() < 0.2 < relative_error(False).median()


@given(st.integers(1, 50), st.integers(1, 2), st.integers(0, 99))
def test_mixed_components_span_the_same_runs(width, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, groups, 3 * width, width, generator=generator) * torch.logspace(0, -1, width)
    plain = fit(moments(x))
    found = mixed(plain)
    identity = torch.eye(width).expand(1, groups, -1, -1)
    torch.testing.assert_close(found.rows @ found.rows.mT, identity, atol=1e-5, rtol=0)
    whole = width // BAND_GRAIN * BAND_GRAIN
    assert torch.equal(found.rows[:, :, whole:], plain.rows[:, :, whole:])
    assert torch.equal(found.deviation[:, :, whole:], plain.deviation[:, :, whole:])
    for start in range(0, whole, BAND_GRAIN):
        run = slice(start, start + BAND_GRAIN)
        spans = [s.rows[:, :, run].mT @ s.rows[:, :, run] for s in (plain, found)]
        torch.testing.assert_close(spans[0], spans[1], atol=1e-5, rtol=0)
        energy = [s.deviation[:, :, run].square().sum(-1) for s in (plain, found)]
        torch.testing.assert_close(energy[0], energy[1])


def test_mixing_spreads_heavy_tails():
    torch.testing.assert_close(hadamard(BAND_GRAIN) @ hadamard(BAND_GRAIN).T, torch.eye(BAND_GRAIN))
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(1, 1, 4000, 32, generator=generator) * torch.randn(1, 1, 4000, 32, generator=generator).exp()
    bands, errors = Bands((0, 0, 0, 32)), []
    for spectrum in (fit(moments(heavy)), mixed(fit(moments(heavy)))):
        basis = fit_steps(spectrum, heavy, True).basis(bands)
        errors.append(float((decode(*encode(heavy, basis, bands, True), basis, bands) - heavy).square().mean()))
    assert errors[1] < 0.8 * errors[0]
