"""Bases that are fitted to the tokens that a layer stores: of all its streams at once where they are alike."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apack_compile.cache.packed_pair import Coding, PackedPair
from apack_compile.cache.token_index import Taken
from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.plan.basis import fit_steps, fit_to_these, spread_of
from apack_compile.plan.plan import STREAMS

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer

# Wider streams are fitted one after the other: their matrices would outweigh a layer's tokens.
TOGETHER_WIDTH = 512

Pair = tuple[Tensor, Tensor]


def fitted_codings(
    layer: "CompactedLayer", tokens: Mapping[str, Pair], where: Mapping[str, Taken], earlier: Mapping[str, PackedPair]
) -> dict[str, tuple[Coding, Coding]]:
    """How K and V `[B, H_kv, n, D]` of each segment are stored, with bases of each row or of all rows.

    where: which of them are real. earlier: the segments of before, whose bases save time.
    """
    if not tokens:
        return {}
    groups, (first, *_) = layer.index.plan.groups, tokens.values()
    plans = [layer.stream_plan(segment, name) for segment in tokens for name in STREAMS]
    rows = len(first[0]) if plans[0].scope == "sequence" else 1
    streams = [[x] for pair in tokens.values() for x in pair]
    reals = [where[segment].real for segment in tokens]
    bands = [plan.bands.at_most(x.shape[2] * len(x) // rows) for plan, (x,) in zip(plans, streams, strict=True)]
    before = [
        earlier[segment].streams[i].basis.decoder if segment in earlier else None for segment in tokens for i in (0, 1)
    ]
    width = first[0].shape[1] * first[0].shape[3] // groups
    if first[0].shape == first[1].shape and len(set(bands)) == 1 and width <= TOGETHER_WIDTH:
        # one segment's sample at a time
        samples = (_sample(pair, real, rows, groups) for pair, real in zip(tokens.values(), reals, strict=True))
        bases = _bases(samples, bands[0], before, groups)
    else:
        bases = []
        for i, (stream, own) in enumerate(zip(streams, bands, strict=True)):
            bases += _bases([_sample(stream, reals[i // 2], rows, groups)], own, before[i : i + 1], groups)
    found = [Coding(basis, own, False) for basis, own in zip(bases, bands, strict=True)]
    return dict(zip(tokens, zip(found[::2], found[1::2], strict=True), strict=True))


Sample = tuple[Tensor, Tensor | None]


def _sample(streams: Sequence[Tensor], real: Tensor | None, rows: int, groups: int) -> Sample:
    """Streams `[B, H, n, D]` one after the other, each with G head groups of some rows, `[S, N, W_g]`; weights `[S, N]` of 1 and 0."""
    batch, heads, tokens, head_dim = streams[0].shape
    count, each = len(streams) * rows, batch // rows * tokens
    x = torch.stack([x.transpose(1, 2) for x in streams])
    if groups == 1:
        x = x.view(count, each, heads * head_dim)
    else:
        x = x.view(count, each, groups, heads // groups * head_dim).transpose(1, 2).flatten(0, 1)
    if real is None:
        return x, None
    return x, real.view(rows, 1, each).repeat(len(streams), groups, 1).flatten(0, 1)


def _bases(samples: Iterable[Sample], bands: Bands, before: Sequence[Tensor | None], groups: int) -> list[StreamBasis]:
    """A basis of each stream of the samples, all with these bands. before: decoders `[S, G, r, W_g]` of earlier ones."""
    # a Gaussian's steps clip a sequence's outliers, which costs more than all else
    fits_steps = not all(band.is_float for count, band in bands.parts if count)
    means, covariances, kept = [], [], []
    for states, weight in samples:
        mean, covariance = spread_of(states, weight)
        means.append(mean)
        covariances.append(covariance)
        kept += [x[None] for x in states] if fits_steps else []
        del states
    known = min(0 if rows is None else rows.shape[2] for rows in before)
    start = (
        torch.cat([rows[:, :, :known].flatten(0, 1) for rows in before if rows is not None])[:, None] if known else None
    )
    spectrum = fit_to_these(torch.cat(means), torch.cat(covariances)[:, None], bands.components, start)
    if fits_steps:
        spectrum = fit_steps(spectrum, kept, token_scale=False)
    parts = [x.chunk(len(before)) for x in spectrum.basis(bands, torch.float16)]
    if groups > 1:
        parts = [[x.squeeze(1).unflatten(0, (-1, groups)) for x in part] for part in parts]
    return [StreamBasis(*part) for part in zip(*parts, strict=True)]
