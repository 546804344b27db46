"""The rule that tells coarse tokens: how much a token matters, from its key and value alone. Those that matter less get fewer bits.

The gradients of calibration (sensitivity.py) say what disturbing each token would cost. Their energy is regressed, layer by layer, on
the token's own key and value. A prompt's tokens are then ranked as they are stored, before anything has attended to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apack_compile.kernels.rotations import rotated
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.tiers import rank_of

# Tokens are told apart from this ratio and this length on: below, all need their bits, or a segment more costs more than it gives
# (docs/notes/quality.md).
LEAST_RATIO, LEAST_TOKENS = 5.0, 1_024
COARSE_SHARE = 0.75
# The newest tokens are read because they are near, whatever they are: they are fine, and say nothing about the others.
NEWEST = 64
# Components of a stream that the regression sees: it keeps a matrix of all pairs per layer.
WIDEST = 512
# Fewer tokens for each weight of the regression do not tell which of them matter.
TOKENS_A_WEIGHT = 2
# Of the features' variance; gradients of few queries are noisy.
RIDGE = 0.01


def tells_apart(ratio: float, tokens: int) -> bool:
    """Whether a plan of this ratio, for prompts of so many tokens, tells coarse tokens from fine ones."""
    return ratio >= LEAST_RATIO and tokens >= LEAST_TOKENS


@dataclass(frozen=True)
class CoarseRule:
    """Which tokens of a modality are stored coarsely: the `share` of a prompt's that is expected to matter least.

    weights: per layer, float32 `[F]`: a token's features times these rank it among the others.
    """

    modality: str
    share: float
    weights: Mapping[int, Tensor]

    def to(self, device: torch.device) -> "CoarseRule":
        """This rule with its weights on a device."""
        return replace(self, weights={layer: weights.to(device) for layer, weights in self.weights.items()})


def features(key: Tensor, value: Tensor) -> Tensor:
    """Features `[B, T, F]`, float32, of tokens `[B, H_kv, T, D]`: the components, means over some heads where they are many, and norms."""
    both = [states.float() for states in (key, value)]
    parts = [
        states.unflatten(1, (averages(*states.shape[1::2]), -1)).mean(2).transpose(1, 2).flatten(2) for states in both
    ]
    return torch.cat([*parts, *(states.norm(dim=-1).mT for states in both)], dim=-1)


def averages(heads: int, head_dim: int) -> int:
    """Into how many means the heads' components go: as many as there are heads, or the most that keep a stream narrow."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * head_dim <= WIDEST))


def feature_count(heads: int, key_dim: int, value_dim: int) -> int:
    """Features of a token."""
    return sum(averages(heads, dim) * dim + heads for dim in (key_dim, value_dim))


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights of a token, float32.

    key, turned, value: `[H_kv, 1, D]`; turned: those of a key as it is before it is rotated by a quarter, None where it is not rotated.
    parts: `[4 H_kv, 1]`, of each head's products with these, of keys and of values, and of each head's norms.
    """

    key: Tensor
    turned: Tensor | None
    value: Tensor
    parts: Tensor

    @staticmethod
    def of_layers(
        weights: Mapping[int, Tensor], shape: tuple[int, int, int], rotation: KeyRotation | None
    ) -> "dict[int, LayerWeights]":
        """Those of all layers, from a token's features' `[F]`; shape: KV heads, width of a key and of a value."""
        heads, *dims = shape
        means = [averages(heads, dim) for dim in dims]
        every = torch.stack(list(weights.values()))
        *of_states, norms = every.split([means[0] * dims[0], means[1] * dims[1], 2 * heads], dim=1)
        key, value = (
            (part / (heads // count)).unflatten(1, (count, 1, dim)).repeat_interleave(heads // count, dim=1)
            for part, count, dim in zip(of_states, means, dims, strict=True)
        )
        turned = [None] * len(every)
        if rotation is not None:
            pairs = len(rotation.frequencies)
            first, second, rest = key.split([pairs, pairs, dims[0] - 2 * pairs], dim=-1)
            turned = torch.cat([-second, first, torch.zeros_like(rest)], -1).unbind()
        parts = torch.cat([torch.ones_like(norms), norms], 1)[..., None]
        found = zip(key.unbind(), turned, value.unbind(), parts.unbind(), strict=True)
        return {layer: LayerWeights(*of_layer) for layer, of_layer in zip(weights, found, strict=True)}


@dataclass(frozen=True)
class RotationTable:
    """How the keys of some tokens are rotated. cosine, sine: float32 `[B, 1, T, D]`, 1 and 0 where nothing rotates.

    flat: float32 `[B N, 2, P]` of all rows, and of tokens to come. start: `[B, 1]`, where each row begins.
    """

    cosine: Tensor
    sine: Tensor
    flat: Tensor
    start: Tensor

    @staticmethod
    def of(rotations: Tensor, tokens: int, head_dim: int) -> "RotationTable":
        """Of the rotations `[B, N, 2, P]` of a chunk of so many tokens, and of those to come, of keys `[..., D]`."""
        rows, each, _, pairs = rotations.shape
        cosine, sine = rotations[:, :tokens].unbind(-2)
        rest = cosine.new_ones(rows, tokens, head_dim - 2 * pairs)
        start = each * torch.arange(rows, device=rotations.device)[:, None]
        both = torch.cat([cosine, cosine, rest], -1), torch.cat([sine, sine, torch.zeros_like(rest)], -1)
        return RotationTable(both[0][:, None], both[1][:, None], rotations.flatten(0, 1), start)

    def at(self, index: Tensor) -> Tensor:
        """Rotations `[B, n, 2, P]` of tokens `[B, n]`."""
        return self.flat[index if len(index) == 1 else index + self.start]


def scores_at(key: Tensor, value: Tensor, table: RotationTable | None, weights: LayerWeights) -> Tensor:
    """Scores `[B, T]` of tokens `[B, H_kv, T, D]`: their features times the weights, without making the features."""
    if table is None:
        of_key = key * weights.key
    else:
        # before it was rotated, a key k was k cos + k' sin, and k' w is k times the turned weights
        of_key = (weights.key * table.cosine).addcmul_(weights.turned, table.sine).mul_(key)
    parts = [of_key.sum(-1)]
    del of_key
    parts.append((value * weights.value).sum(-1))
    parts += [torch.linalg.vector_norm(states, dim=-1, dtype=parts[0].dtype) for states in (key, value)]
    return torch.cat(parts, dim=1).mul_(weights.parts).sum(1)


def scores_of(key: Tensor, value: Tensor, coordinates: Tensor, rotation: KeyRotation | None, weights: Tensor) -> Tensor:
    """Scores `[B, T]` of tokens `[B, H_kv, T, D]` at rotary `coordinates` `[B, T, C]`."""
    heads, tokens, head_dim = key.shape[1:]
    table = None if rotation is None else RotationTable.of(rotation.at(coordinates), tokens, head_dim)
    of_layer = LayerWeights.of_layers({0: weights}, (heads, head_dim, value.shape[3]), rotation)[0]
    return scores_at(key, value, table, of_layer)


def unrotated(key: Tensor, coordinates: Tensor, rotation: KeyRotation | None) -> Tensor:
    """Keys `[B, H_kv, T, D]` as they were before they were rotated by their `coordinates` `[B, T, C]`, where that is known."""
    return key if rotation is None else rotated(key.float(), rotation.at(coordinates)[:, None], back=True)


class RunningImportance:
    """Sums of the regression of a layer, float64: features' and their product with the logarithm of the gradients' energy."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.gram = self.cross = self.target = torch.zeros(())

    def add(self, x: Tensor, energy: Tensor) -> None:
        """Add tokens with features `[N, F]` and gradients' energy `[N]`; those without any are left out."""
        x, seen = x.double(), energy > 0
        x, target = x[seen], energy[seen].log()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.gram = self.gram + x.mT @ x
        self.cross = self.cross + x.mT @ target
        self.target = self.target + target.sum()

    @property
    def is_known(self) -> bool:
        """Whether enough tokens were seen."""
        return self.count > 0 and self.count >= TOKENS_A_WEIGHT * len(self.total)

    def finish(self) -> Tensor:
        """The ridge regression's weights `[F]`, float32."""
        mean = self.total / self.count
        covariance = self.gram / self.count - mean[:, None] * mean
        scale = covariance.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        covariance = covariance / scale / scale[:, None] + RIDGE * torch.eye(len(mean)).to(covariance)
        cross = (self.cross / self.count - mean * self.target / self.count) / scale
        return (torch.linalg.solve(covariance, cross) / scale).float()


def least_important(candidates: Tensor, scores: Tensor, share: float) -> Tensor:
    """The `share` of each row's candidates, bool `[B, T]`, with the lowest scores `[B, T]`; rounded down."""
    place = rank_of(scores.masked_fill(~candidates, float("inf")).argsort(dim=1, stable=True))
    return candidates & (place < (candidates.sum(1, keepdim=True) * share).long())
