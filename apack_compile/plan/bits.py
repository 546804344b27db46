"""Bits of a stream's components: the widths that lose least within a budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.format import BANDS, WIDTHS, Bands
from apack_compile.plan.basis import BAND_GRAIN, Spectrum

# Bytes of a token that the matrix unit of a GPU takes at once, 16 words (kernels/triton_words.py); and that are loaded at once.
TILE_BYTES, ALIGNED = 32, 8


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


def fill_aligned(streams: Sequence[Tensor], cost: Tensor, budget: float, whole_tiles: bool = False) -> list[Bands]:
    """Bands of each stream for a GPU, which minimise the weighted distortion within `budget`.

    As `water_fill`, but tokens are multiples of `ALIGNED` bytes: the last band has what the others lack. whole_tiles: all others are
    whole tiles too. `streams` are a component's distortion when dropped, in order, each `[components]`; `cost` `[streams]` is what one
    bit of a stream's token counts, float64.
    """
    weights = torch.nn.utils.rnn.pad_sequence([stream.double().cpu() for stream in streams], batch_first=True)
    most = torch.tensor([len(stream) for stream in streams])[:, None, None]
    widths = torch.tensor(WIDTHS, dtype=torch.float64)
    steps = torch.tensor([8 * TILE_BYTES // bits if whole_tiles else BAND_GRAIN for bits in WIDTHS[:-1]])
    cumulated = torch.nn.functional.pad(weights.cumsum(1), (1, 0))
    ups = torch.cartesian_prod(*[torch.arange(2)] * len(WIDTHS))
    distortion = torch.tensor([band.distortion for band in BANDS], dtype=torch.float64)

    def choose(slope: float) -> Tensor:
        """Components of each band `[streams, bands]`: what is best component by component, each band rounded up or down."""
        lagrangian = [weights * band.distortion + slope * cost[:, None] * band.bits for band in BANDS]
        best = torch.stack([*lagrangian, weights], -1).argmin(-1)
        exact = torch.stack([(best == band).sum(1) for band in range(len(BANDS))], -1)[:, None]
        wide = ((exact[..., :-1] // steps + ups[:, :-1]) * steps).cumsum(-1).minimum(most)
        wide = wide.diff(dim=-1, prepend=torch.zeros_like(wide[..., :1]))
        last = last_band(wide, exact[..., -1] * WIDTHS[-1] / 8, ups[:, -1], most[..., 0])
        counts = torch.cat([wide, last[..., None]], -1)
        ends = counts.cumsum(-1)
        kept = cumulated.gather(1, ends.flatten(1)).unflatten(1, ends.shape[1:])
        of_band = kept.diff(dim=-1, prepend=torch.zeros_like(kept[..., :1]))
        bits = (counts * widths).sum(-1)
        total = (of_band * distortion).sum(-1) + cumulated[:, -1:] - kept[..., -1] + slope * cost[:, None] * bits
        # streams that are narrower than what is aligned are not
        total = torch.where(bits % (8 * ALIGNED) > 0, 1e3 * total, total)
        # a stream without components is not worth its place, and the leading ones keep their width: where few have most of the
        # variance, clipping loses more than the distortion of a Gaussian says
        widest = (exact[:, 0] > 0).int().argmax(-1)[:, None, None].expand(-1, len(ups), 1)
        narrowed = (exact.sum(-1) > 0) & (counts.gather(-1, widest)[..., 0] == 0)
        total = total.masked_fill((ends[..., -1] == 0) | narrowed, float("inf"))
        return counts[torch.arange(len(counts)), total.argmin(1)]

    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        taken = float(((choose(2.0**middle) * widths).sum(1) * cost).sum())
        low, high = (middle, high) if taken > budget else (low, middle)
    return [Bands(tuple(counts)) for counts in choose(2.0**high).tolist()]


def last_band(wide: Tensor, wanted: Tensor, up: Tensor, most: Tensor) -> Tensor:
    """Components of the last band `[streams, choices]` that make a token's bytes a multiple of `ALIGNED`.

    wide: components of the other bands. wanted: bytes of the last one. up: whether to round up. most: components of all bands.
    """
    each = 8 // WIDTHS[-1]
    taken = (wide * torch.tensor(WIDTHS[:-1])).sum(-1) / 8
    room = (most - wide.sum(-1)) / each
    aligned = ((taken + wanted) // ALIGNED + up) * ALIGNED
    aligned = torch.where(aligned > taken + room, (taken + room) // ALIGNED * ALIGNED, aligned)
    whole = aligned >= taken
    return (torch.where(whole, aligned - taken, torch.minimum(wanted, room)) * each).long().clamp(min=0)


def runs_of(weights: Tensor) -> tuple[Tensor, list[int]]:
    """Weights `[r]` of components, summed over runs, and each run's length."""
    runs = weights.double().split(BAND_GRAIN)
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
