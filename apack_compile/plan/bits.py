"""Bits of a stream's components: the widths that lose least within a budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.format import BANDS, WIDTHS, Bands
from apack_compile.plan.basis import BAND_GRAIN, Spectrum


def water_fill(weights: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Bits per run of components `[n]` that minimise the weighted distortion within `budget`.

    Reverse water-filling over the widths that exist: a run takes the width with the smallest
    `weight * distortion(width) + slope * cost * width`, and the slope is bisected. `weights` is a run's distortion when
    dropped, `cost` what one bit in it counts, float64.
    """
    # a run that is dropped takes no bits
    widths = torch.tensor([*WIDTHS, 0], dtype=torch.float64)
    distortion = torch.tensor([*(band.distortion for band in BANDS), 1.0], dtype=torch.float64)

    def choose(slope: float) -> Tensor:
        lagrangian = weights[:, None] * distortion + slope * cost[:, None] * widths
        return widths[lagrangian.argmin(1)]

    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        if float((choose(2.0**middle) * cost).sum()) > budget:
            low = middle
        else:
            high = middle
    return choose(2.0**high)


def runs_of(spectrum_weights: Tensor) -> tuple[Tensor, list[int]]:
    """Weights `[G, r]` of components summed over head groups and runs, and each run's length."""
    total = spectrum_weights.sum(0).double().cpu()
    runs = total.split(BAND_GRAIN)
    return torch.stack([run.sum() for run in runs]), [len(run) for run in runs]


def largest_ratio(width: int) -> float:
    """The ratio of a stream of this width with one run of the fewest bits and a scale per token: nothing smaller is worth storing."""
    return 16 * width / (min(WIDTHS) * min(BAND_GRAIN, width) + 16)


def bands_of(bits: Sequence[float], lengths: Sequence[int]) -> Bands:
    """Bands of runs with falling bits; the first run is not dropped."""
    components = dict.fromkeys((*WIDTHS, 0), 0)
    for run, (width, length) in enumerate(zip(bits, lengths, strict=True)):
        components[int(max(width, min(WIDTHS)) if run == 0 else width)] += length
    return Bands.of(components)


def expected_error(spectrum: Spectrum, bands: Bands) -> float:
    """Share of a stream's variance that these bands lose, for Gaussian components."""
    variance = spectrum.deviation.double().square().sum((0, 1))
    lost = torch.tensor([band.distortion for band in bands.each], dtype=torch.float64, device=variance.device)
    kept = variance[: len(lost)]
    return float((variance.sum() - kept.sum() + (kept * lost).sum()) / variance.sum())
