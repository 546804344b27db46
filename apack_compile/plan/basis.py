"""Fit of a basis: mean, orthonormal components and quantizer steps of one stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from apack_compile.kernels.format import BANDS, Band, Bands, StreamBasis

# Above this width an eigendecomposition of the covariance costs more than a few products with a block, from random rows; above half of
# it, from an earlier basis (benchmarks/subspace.py).
EIGH_MAX_WIDTH = 256
# Iterations from random rows, and from a basis of most of the same tokens.
SUBSPACE_ITERATIONS, WARM_ITERATIONS = 4, 2
OVERSAMPLING = 8
# Components get their bits in runs of this many: the tile a kernel reads.
BAND_GRAIN = 16
STEP_FACTORS = (0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
# Every step clips at this many deviations or before. Bins are much narrower than the narrowest step.
LEVEL_BANDS = tuple(band for band in BANDS if not band.is_float)
BINS_A_DEVIATION = 256
BINS = round(max(band.top / 2 * band.step for band in LEVEL_BANDS) * STEP_FACTORS[-1] * BINS_A_DEVIATION)
COMPONENTS_AT_ONCE = 64
# Of a component of a sequence's own basis: its float16 numbers then reach as far as what rounding the mean leaves.
LEAST_VARIANCE = 1e-12

# How fast what is spread over all directions vanishes with tokens. Bases of text must serve text that comes later.
TEXT_SPREAD = 20
# Of pictures a request has all in its prompt: 20 cost eight times the KL where a basis was of one prompt's pictures, 1e6 three times
# in the prompts after it (docs/notes/quality.md, "A first request with little text").
VISION_SPREAD = 1_000


@dataclass(frozen=True)
class Moments:
    """Weighted token count `[S, G]`, mean `[S, G, W_g]` and covariance `[S, G, W_g, W_g]`, float32 or better."""

    count: Tensor
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Spectrum:
    """Every component of a stream, before bands are chosen.

    mean `[S, G, W_g]`, rows `[S, G, r, W_g]` orthonormal, by falling deviation `[S, G, r]`; factors `[S, G, r]` per band width: what the
    steps of a Gaussian are multiplied with, 1 where there are none.
    """

    mean: Tensor
    rows: Tensor
    deviation: Tensor
    factors: Mapping[int, Tensor] = field(default_factory=dict)

    def steps(self, band: Band, components: slice = slice(None)) -> Tensor:
        """Steps `[S, G, n]` of some components in a band, for a token scale of 1; may be a view."""
        whole = components == slice(None) or components == slice(0, self.deviation.shape[-1])
        step = self.deviation if whole else self.deviation[..., components]
        step = step if band.step == 1 else step * band.step
        return step * self.factors[band.bits][..., components] if band.bits in self.factors else step

    def basis(self, bands: Bands, dtype: torch.dtype = torch.float32) -> StreamBasis:
        """The stream basis of these bands; owns its memory."""
        start, steps = 0, [self.deviation[..., :0]] if bands.components == 0 else []
        for count, band in bands.parts:
            if count:
                steps.append(self.steps(band, slice(start, start + count)))
            start += count
        rows = self.rows if start == self.rows.shape[2] else self.rows[:, :, :start]
        rows = rows.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return StreamBasis(self.mean.to(dtype, copy=True), rows, torch.cat(steps, dim=-1).float())


def moments(x: Tensor, weight: Tensor | None = None) -> Moments:
    """Moments of tokens `[S, G, N, W_g]`; `weight` `[S, N]` is 0 for a token to leave out."""
    shape = x.shape[:2]
    every = None if weight is None else weight[:, None].expand(*shape, -1).flatten(0, 1)
    count = x.new_full(shape, x.shape[2]) if every is None else every.sum(-1).view(shape)
    mean, covariance = spread_of(x.flatten(0, 1), every)
    return Moments(count.to(mean.dtype), mean.view(*shape, -1), covariance.unflatten(0, shape))


def spread_of(x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean `[S, 1, W]` and covariance `[S, W, W]`, float32 or better, of tokens `[S, N, W]`; `weight` `[S, N]` is 0 for those left out."""
    own = x if x.dtype.itemsize >= 4 else x.float()
    is_copy, x = own is not x, own
    if weight is None:
        mean = x.mean(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1, x.shape[2])
        centered = x.sub_(mean) if is_copy else x - mean
        # the mean is not added: a product and its scale are one operation
        return mean, torch.baddbmm(mean, centered.mT, centered, beta=0, alpha=1 / max(x.shape[1], 1))
    weight = weight.to(x.dtype)[:, :, None]
    total = weight.sum(1, keepdim=True).clamp_min_(1)
    mean = (x * weight).sum(1, keepdim=True).div_(total)
    centered = (x - mean).mul_(weight)
    return mean, torch.bmm(centered.mT, centered).div_(total)


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors, smallest first, in float64: LAPACK's float32 fails on a covariance of mere rounding errors."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def principal_rows(covariance: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Leading `rank` eigenvectors as orthonormal rows `[..., rank, W]` and their eigenvalues, largest first.

    Eigendecomposition for narrow streams, subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4) where the width is large and
    the rank a small part of it: from random rows or, with fewer iterations, from `start` `[..., n, W]`, rows of a similar covariance.
    """
    width = covariance.shape[-1]
    worth = 1 if start is None else 2
    if width <= EIGH_MAX_WIDTH // worth or rank + OVERSAMPLING >= width // 4 * worth:
        return leading(*symmetric_eigen(covariance), rank)
    generator = torch.Generator(device=covariance.device).manual_seed(0)
    shape = (*covariance.shape[:-1], rank + OVERSAMPLING)
    block = torch.randn(shape, generator=generator, device=covariance.device, dtype=covariance.dtype)
    if start is not None:
        block[..., : start.shape[-2]] = start[..., : block.shape[-1], :].mT
    for _ in range(SUBSPACE_ITERATIONS if start is None else WARM_ITERATIONS):
        block = torch.linalg.qr(covariance @ block).Q
    rows, variance = leading(*symmetric_eigen(block.mT @ covariance @ block), rank)
    return rows @ block.mT, variance


def leading(values: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest `rank` of the eigenvalues, falling, and their vectors as rows, which may be a view; smallest first are given."""
    if rank < values.shape[-1]:
        values, vectors = (x.narrow(-1, x.shape[-1] - rank, rank) for x in (values, vectors))
    return vectors.flip(-1).mT, values.flip(-1)


def fit(stats: Moments, rank: int | None = None, spread: float = TEXT_SPREAD) -> Spectrum:
    """Spectrum of a stream from its moments, with the steps of a Gaussian.

    A little of the mean variance is spread over all directions, W_g / (W_g + spread * tokens) of it: with few the sample knows only
    some of them, and a frozen basis must still serve the tokens to come.
    """
    width = stats.mean.shape[-1]
    rows, variance = principal_rows(stats.covariance, width if rank is None else min(rank, width))
    average = stats.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    share = width / (width + spread * stats.count.to(average.dtype))
    variance = (1 - share)[..., None] * variance.clamp_min_(0) + (share * average)[..., None]
    magnitude = (average + stats.mean.square().mean(-1)).sqrt()
    floor = torch.finfo(torch.float32).eps * magnitude + torch.finfo(torch.float32).tiny ** 0.5
    return Spectrum(stats.mean, rows, torch.maximum(variance.sqrt(), floor[..., None]))


def fit_to_these(mean: Tensor, covariance: Tensor, rank: int, start: Tensor | None = None) -> Spectrum:
    """Spectrum of a stream for these tokens alone; `start` `[S, G, n, W_g]`, rows of an earlier basis, saves time."""
    rows, variance = principal_rows(covariance, min(rank, mean.shape[-1]), start)
    return Spectrum(mean, rows, variance.clamp_min_(LEAST_VARIANCE).sqrt_())


def mixed(spectrum: Spectrum) -> Spectrum:
    """The same spectrum with each whole run of components mixed by a Hadamard matrix; what is left over stays.

    Components of a run have about the same variance and the same bits, but heavy tails, which clip: their sums and differences are
    closer to Gaussian (QuaRot, arXiv 2404.00456, mixes whole heads for the same reason).
    """
    runs, size = spectrum.rows.shape[2] // BAND_GRAIN, BAND_GRAIN
    mixing = hadamard(size).to(spectrum.rows)
    rows, deviation = spectrum.rows.clone(), spectrum.deviation.clone()
    whole = rows[:, :, : runs * size].unflatten(2, (runs, size))
    rows[:, :, : runs * size] = (mixing @ whole).flatten(2, 3)
    variance = deviation[:, :, : runs * size].square().unflatten(2, (runs, size)).mean(-1, keepdim=True)
    deviation[:, :, : runs * size] = variance.sqrt().expand(-1, -1, -1, size).flatten(2, 3)
    return Spectrum(spectrum.mean, rows, deviation)


def hadamard(size: int) -> Tensor:
    """Orthonormal Hadamard matrix `[size, size]` of a power of two (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


def fit_steps(spectrum: Spectrum, sample: Tensor | Sequence[Tensor], token_scale: bool) -> Spectrum:
    """The same spectrum with, per component and width, the step that serves `sample` best (squared error): S tensors `[G, N, W_g]`."""
    factors = {band.bits: torch.ones_like(spectrum.deviation) for band in LEVEL_BANDS}
    errors = step_errors(spectrum.mean.device)
    for s, g in product(*map(range, spectrum.deviation.shape[:2])):
        deviation = spectrum.deviation[s, g]
        tokens = sample[s][g].to(spectrum.mean.dtype) - spectrum.mean[s, g]
        found = best_factors((tokens @ spectrum.rows[s, g].mT).div_(deviation), token_scale, errors)
        for bits, best in found.items():
            factors[bits][s, g] = best
    return Spectrum(spectrum.mean, spectrum.rows, spectrum.deviation, factors)


class StepErrors(NamedTuple):
    """Squared errors of every band's steps: in the middle of each bin `[bins, steps]`, and where each step clips `[steps]`."""

    of_bins: Tensor
    limits: Tensor


def step_errors(device: torch.device) -> StepErrors:
    """Those of the steps that `best_factors` chooses from, band by band."""
    middles = (torch.arange(BINS, device=device) + 0.5)[:, None, None] / BINS_A_DEVIATION
    steps = torch.tensor([[band.step * factor for factor in STEP_FACTORS] for band in LEVEL_BANDS], device=device)
    tops = torch.tensor([[band.top] for band in LEVEL_BANDS], device=device)
    # levels are odd multiples of half a step
    levels = ((middles / steps - 0.5).round() + 0.5).clamp_max(tops / 2) * steps
    return StepErrors((levels - middles).square().flatten(1), (tops / 2 * steps).flatten())


def best_factors(x: Tensor, token_scale: bool, errors: StepErrors) -> dict[int, Tensor]:
    """For each band of levels, what a Gaussian's step is best multiplied with `[r]` for components `[N, r]` of deviation 1; changes `x`.

    A component's numbers are counted in narrow bins, once for all steps: a step's error is that of the bins' middles. What is beyond the
    last bin is clipped by every step, so its sums are enough.
    """
    if token_scale:
        x /= x.square().mean(-1, keepdim=True).sqrt_().clamp_min_(1e-6)
    x.abs_()
    found = []
    for part in x.split(COMPONENTS_AT_ONCE, dim=1):
        place = (part * BINS_A_DEVIATION).clamp_max_(BINS).long()
        counts = x.new_zeros(BINS + 1, part.shape[1]).scatter_add_(0, place, torch.ones_like(part)).mT
        beyond = part.where(place == BINS, 0)
        number, total, squares = counts[:, -1:], beyond.sum(0)[:, None], beyond.square().sum(0)[:, None]
        clipped = squares - 2 * total * errors.limits + number * errors.limits.square()
        found.append(counts[:, :-1] @ errors.of_bins.to(x.dtype) + clipped)
    factors = torch.tensor(STEP_FACTORS, device=x.device)
    chosen = factors[torch.cat(found).unflatten(1, (len(LEVEL_BANDS), -1)).argmin(-1)]
    return {band.bits: chosen[:, i] for i, band in enumerate(LEVEL_BANDS)}
