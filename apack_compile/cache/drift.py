"""Whether a basis that all requests share still fits the tokens of this one, and a new one where it does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import Bands, StreamBasis, decode
from apack_compile.plan.basis import fit, fit_steps, mixed, moments

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer

# A prompt may lose this many times what the calibration's tokens lose, and this share more, before its basis is refitted.
ERROR_FACTOR = 4.0
ERROR_MARGIN = 0.02
SAMPLE_TOKENS = 256


@dataclass(frozen=True)
class Fit:
    """Share of a prompt's variance that coding loses: found, and expected from the calibration."""

    found: float
    expected: float

    @property
    def is_bad(self) -> bool:
        """Whether the basis must be refitted."""
        return self.found > ERROR_FACTOR * self.expected + ERROR_MARGIN


def lost_share(x: Tensor, real: Tensor, basis: StreamBasis, bands: Bands, token_scale: bool) -> float:
    """Share of the variance of an even sample of tokens `[B, G, N, W_g]` that coding loses; `real` `[B, N]` leaves out empty ones."""
    every = max(x.shape[2] // SAMPLE_TOKENS, 1)
    x, weight = x[:, :, ::every].float(), real[:, None, ::every, None].float()
    error = (decode(*encode(x, basis, bands, token_scale), basis, bands) - x).square()
    mean = (x * weight).sum((0, 2), keepdim=True) / weight.sum().clamp_min(1)
    variance = ((x - mean).square() * weight).sum()
    return float((error * weight).sum() / variance.clamp_min(torch.finfo(torch.float32).tiny))


def refit(x: Tensor, real: Tensor, bands: Bands, like: StreamBasis) -> StreamBasis:
    """A basis of the tokens `[B, G, N, W_g]` of all rows, in the shapes and dtypes of `like`."""
    pooled = x.transpose(0, 1).flatten(1, 2)[:, real.flatten()][None]
    spectrum = fit_steps(mixed(fit(moments(pooled))), pooled.float(), token_scale=True)
    basis = spectrum.basis(bands)
    return StreamBasis(*(new.to(old.dtype) for new, old in zip(basis, like, strict=True)))


def fit_notes(layers: Sequence["CompactedLayer"]) -> Iterator[str]:
    """What is said of the shared bases that did not fit a prompt."""
    streams = 4 * len(layers)
    refitted = sum(len(layer.refitted) for layer in layers)
    bad = sum(fit.is_bad for layer in layers for fit in layer.fits.values())
    if refitted:
        yield f"{refitted} of {streams} shared bases did not fit this prompt: refitted, stored with the sequence"
    if bad:
        yield f"{bad} of {streams} streams lose more than their calibration promised; calibrate on such inputs"
