"""Statistics of a stream, summed over tokens: its basis, its bits' steps, and what dropping a component harms.

Memory does not grow with the tokens that are added: sums, and a sample of bounded size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apack_compile.kernels.autocast import without_autocast
from apack_compile.plan.basis import TEXT_SPREAD, VISION_SPREAD, Moments, Spectrum, fit, fit_steps, mixed
from apack_compile.plan.budget import StreamStatistics
from apack_compile.plan.source import Statistics

# Steps are fitted to these: with 512 the tails were missed, and clipping there cost more than all else (docs/notes/quality.md).
SAMPLE_TOKENS = 2_048
# Where there are several times as many streams, or a user waits for a first request.
SMALL_SAMPLE = 1_024
# Gradients know a stream's sensitivity roughly, and large disturbances do not cost what small ones promise: its total counts with
# this power (docs/notes/quality.md).
SENSITIVITY_POWER = 0.5
# The sensitivity of single components is drawn towards their mean as if this many queries had seen them all alike.
PRIOR_QUERIES = 32

# The covariance of text, which is to serve text that comes later, is drawn towards that of pictures as if this many tokens had it:
# most prompts with pictures have little text (docs/notes/quality.md, "A first request with little text").
PRIOR_TOKENS = 32

# Layer, segment, and 0 for keys or 1 for values.
StreamKey = tuple[int, str, int]


@dataclass
class TokenSample:
    """At most `size` tokens `[G, n, W_g]` in bfloat16, each as likely as any other: those that drew the lowest numbers."""

    size: int = SAMPLE_TOKENS
    drawn: Tensor | None = None
    tokens: Tensor | None = None
    seen: int = 0

    def add(self, x: Tensor) -> None:
        """Add tokens `[G, N, W_g]`."""
        generator = torch.Generator().manual_seed(self.seen)
        self.seen += x.shape[1]
        drawn = torch.rand(x.shape[1], generator=generator).to(x.device)
        if self.tokens is None or self.drawn is None:
            self.drawn, self.tokens = drawn[:0], x[:, :0].bfloat16()
        room = self.size - len(self.drawn)
        if room:
            self.drawn = torch.cat([self.drawn, drawn[:room]])
            self.tokens = torch.cat([self.tokens, x[:, :room].bfloat16()], 1)
        if x.shape[1] > room:
            self._exchange(x[:, room:], drawn[room:])

    def _exchange(self, x: Tensor, drawn: Tensor) -> None:
        """Put those of the tokens `x` that drew lower numbers in the places of those held that drew higher ones."""
        held = len(self.drawn)
        lowest = torch.cat([self.drawn, drawn]).topk(held, largest=False).indices
        new = lowest[lowest >= held] - held
        places = torch.ones(held, dtype=torch.bool, device=x.device)
        places[lowest[lowest < held]] = False
        self.drawn[places], self.tokens[:, places] = drawn[new], x[:, new].bfloat16()


@dataclass
class RunningMoments:
    """Sums over tokens `[G, N, W_g]`, taken around the first batch's mean, and a sample of the tokens."""

    count: int = 0
    center: Tensor | None = None
    total: Tensor | None = None
    gram: Tensor | None = None
    sample: TokenSample = field(default_factory=TokenSample)
    sensitivity: Tensor | None = None
    gradients: int = 0
    queries: int = 0

    def add(self, x: Tensor) -> None:
        """Add tokens."""
        x = x.float()
        if self.center is None:
            self.center = x.mean(1)
            self.total = torch.zeros_like(self.center)
            self.gram = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
        shifted = x - self.center[:, None]
        self.count += x.shape[1]
        self.total += shifted.sum(1)
        self.gram.baddbmm_(shifted.mT, shifted)
        self.sample.add(shifted)

    def add_gradients(self, gradients: Tensor) -> None:
        """Add gradients `[G, N, W_g]` with respect to N tokens; `queries` tells of how many next tokens they are."""
        gradients = gradients.float()
        if self.sensitivity is None:
            self.sensitivity = gradients.new_zeros(gradients.shape[0], gradients.shape[2], gradients.shape[2])
        self.sensitivity.baddbmm_(gradients.mT, gradients)
        self.gradients += gradients.shape[1]

    def draw_towards(self, other: "RunningMoments", tokens: int) -> None:
        """As if so many more tokens had been seen, around the mean of its own, with the covariance of `other`."""
        shift, elsewhere = self.total / self.count, other.total / other.count
        self.gram += tokens * (other.finish().covariance[0] + shift[:, :, None] * shift[:, None])
        self.total += tokens * shift
        self.count += tokens
        sample = other.sample.tokens[:, :: max(other.sample.tokens.shape[1] // tokens, 1)][:, :tokens]
        self.sample.add(sample.float() + (shift - elsewhere)[:, None])

    def forget_gradients(self) -> None:
        """As if none had been added."""
        self.sensitivity, self.gradients, self.queries = None, 0, 0

    def finish(self) -> Moments:
        """Moments with a leading dimension of 1 (one basis for all sequences)."""
        shift = self.total / self.count
        covariance = self.gram / self.count - shift[:, :, None] * shift[:, None]
        count = torch.full((1, len(shift)), self.count, device=shift.device)
        return Moments(count, (self.center + shift)[None], covariance[None])

    def spectrum(self, spread: float) -> Spectrum:
        """Spectrum of the stream, with steps that serve a sample of its tokens best."""
        found = mixed(fit(self.finish(), spread=spread))
        tokens = self.sample.tokens.float() + self.center[:, None]
        return fit_steps(found, tokens[None], token_scale=True)

    def harm(self, spectrum: Spectrum) -> Tensor | None:
        """Harm `[G, r]` of dropping each component: sensitivity times variance, the total damped; None if nothing read the stream."""
        if self.sensitivity is None or not bool(self.sensitivity.any()):
            return None
        rows = spectrum.rows[0]
        sensed = ((rows @ (self.sensitivity / self.gradients)) * rows).sum(-1)
        prior = PRIOR_QUERIES / (PRIOR_QUERIES + self.queries)
        found = ((1 - prior) * sensed + prior * sensed.mean()) * spectrum.deviation[0].square()
        return found * found.sum() ** (SENSITIVITY_POWER - 1)


Running = dict[StreamKey, RunningMoments]
Fitted = dict[StreamKey, tuple[Spectrum, Tensor | None]]


@without_autocast
def fitted(running: Running, advance: Callable[[], Any] = lambda: None) -> Fitted:
    """Spectrum and harm of every stream; empties `running`, so that sums go as bases come. advance: called for each layer."""
    found: Fitted = {}
    for layer in dict.fromkeys(layer for layer, _, _ in running):
        for key in [key for key in running if key[0] == layer]:
            moments = running.pop(key)
            spectrum = moments.spectrum(VISION_SPREAD if key[1].endswith("vision") else TEXT_SPREAD)
            found[key] = spectrum, moments.harm(spectrum)
        advance()
    return found


def by_layer(fitted: Fitted) -> Statistics:
    """Statistics of every layer by segment; a stream that nothing read counts as much as the others do on average."""
    known = [math.log(float(harm.sum())) for _, harm in fitted.values() if harm is not None]
    typical = math.exp(sum(known) / len(known)) if known else 1.0
    finished = {}
    for key, (spectrum, harm) in fitted.items():
        variance = spectrum.deviation[0].square()
        finished[key] = StreamStatistics(spectrum, typical * variance / variance.sum() if harm is None else harm)
    statistics: Statistics = {}
    for layer, segment, _ in finished:
        statistics.setdefault(layer, {})[segment] = (finished[layer, segment, 0], finished[layer, segment, 1])
    return statistics
