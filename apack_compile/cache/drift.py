"""Whether a basis that all requests share still fits the tokens of this one, and a new one where it does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from apack_compile.cache.packed_pair import Coding, Tokens
from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.plan.basis import fit, fit_steps, mixed, moments
from apack_compile.plan.plan import STREAMS

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer

# A prompt may lose this many times what the calibration's tokens lose, and this share more, before its basis is refitted.
ERROR_FACTOR = 4.0
ERROR_MARGIN = 0.02


@dataclass(frozen=True)
class Fit:
    """Share of a prompt's variance that coding loses: found, and expected from the calibration."""

    found: float
    expected: float

    @property
    def is_bad(self) -> bool:
        """Whether the basis must be refitted."""
        return self.found > ERROR_FACTOR * self.expected + ERROR_MARGIN


@dataclass(frozen=True)
class WatchedPair:
    """A packed pair whose shared bases may not fit.

    lost: float32 `[2]` on the device, the share of the variance of K and V that coding loses. expected: the same from the calibration;
    None for a stream without a shared basis. tokens: what was packed, where nothing else is stored with these bases; else None.
    """

    segment: str
    lost: Tensor
    expected: tuple[float | None, float | None]
    tokens: Tokens | None


def judge(layer: "CompactedLayer", watched: WatchedPair, lost: Sequence[float]) -> None:
    """Keep how well a pair's bases fit its tokens; pack them with others where they do not and can be packed again."""
    named = zip(STREAMS, lost, watched.expected, strict=True)
    fits = {name: Fit(found, expected) for name, found, expected in named if expected is not None}
    layer.fits |= {f"{watched.segment}_{name}": fit for name, fit in fits.items()}
    bad = [name for name, fit in fits.items() if fit.is_bad]
    tokens, pair = watched.tokens, layer.pairs[watched.segment]
    if not bad or tokens is None:
        return
    codings = {name: Coding.of(getattr(pair, name)) for name in STREAMS}
    for name in bad:
        old = codings[name]
        codings[name] = replace(old, basis=refit(tokens.grouped(name), tokens.real, old.bands, old.basis))
    again, lost_again = tokens.packed(pair.kind, codings["key"], codings["value"])
    for name, found in zip(STREAMS, lost_again.tolist(), strict=True):
        if name in bad and found < fits[name].found:
            stream = f"{watched.segment}_{name}"
            layer.pairs[watched.segment] = layer.pairs[watched.segment].with_stream(name, getattr(again, name))
            layer.refitted[stream], layer.fits[stream] = fits[name], Fit(found, fits[name].expected)
    layer.follow_tensors()


def refit(x: Tensor, real: Tensor | None, bands: Bands, like: StreamBasis) -> StreamBasis:
    """A basis of the tokens `[B, G, N, W_g]` of all rows that are `real` `[B, N]`, in the shapes and dtypes of `like`."""
    pooled = x.transpose(0, 1).flatten(1, 2)
    pooled = (pooled if real is None else pooled[:, real.flatten()])[None]
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
