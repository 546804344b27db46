"""Tiers: which packed tokens are kept, by a preset's score, and how much of them a decode step reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Shares are rounded up, but 0.3 * 10 is 3.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Prompt:
    """What a preset sees of a prompt that was read, and of the tokens before it.

    attention: `[B, R, T]`, what its R newest tokens pay to each token, mean over heads. oldest: position `[B]` of the first of the R.
    key: `[B, H_kv, T, D]`, as the model has them.
    """

    attention: Tensor
    oldest: Tensor
    key: Tensor


@dataclass(frozen=True)
class Tokens:
    """Slots whose tokens compete to be kept, `[B, N]` each.

    importance: float32. held: bool, the slots with a token. place: which of its row's tokens it is, oldest first. count: tokens `[B]`;
    seen: the same with evicted ones.
    """

    modalities: tuple[str, ...]
    importance: Tensor
    held: Tensor
    place: Tensor
    count: Tensor
    seen: Tensor


class TierRule:
    """What a preset does with tokens: what their importance is, which are kept, and how much of them a step reads.

    Presets say otherwise by fields, properties or methods of the same name. Shares are of a row's vision tokens so far, rounded up to
    whole tokens.
    """

    @property
    def full(self) -> float:
        """Share of vision tokens read with all value components."""
        return 1.0

    @property
    def partial(self) -> float:
        """Leading share of the value components that the others are read with."""
        return 1.0

    @property
    def attended(self) -> float:
        """Share of vision tokens that are read at a step at all."""
        return 1.0

    @property
    def kept(self) -> float:
        """Share of vision tokens that are kept."""
        return 1.0

    @property
    def refresh_every(self) -> int:
        """Decode steps between two choices of what is read.

        Where fewer are attended than kept, all are attended every so many steps, and chosen from anew after it.
        """
        return 1

    @property
    def decay(self) -> tuple[float, float, float, float]:
        """Of importance at a step: the old one's weight and the new attention's, of vision, then of text."""
        return (1.0, 0.0, 1.0, 0.0)

    @property
    def pools(self) -> tuple[tuple[str, ...], ...]:
        """Modalities whose tokens compete for one budget after a prefill; those of no pool are kept."""
        return ()

    @property
    def prune_every(self) -> int | None:
        """Decode steps between two evictions from the pool of text; None for none after the prefill."""
        return None

    @property
    def queries(self) -> int:
        """Newest tokens of a prompt whose attention the importance is made of."""
        return 1

    @property
    def reads_all(self) -> bool:
        """Whether a step reads every token that is kept, whole, and changes no importance."""
        return False

    @property
    def revisits(self) -> bool:
        """Whether all kept tokens are attended once in a while."""
        return self.attended < self.kept

    def read_share(self, modality: str) -> float:
        """Share of a modality's tokens that a step reads."""
        return min(self.kept, self.attended) if modality == "vision" else 1.0

    def importance(self, prompt: Prompt) -> Tensor:
        """Importance `[B, T]` of the tokens of a prompt that was read."""
        return prompt.attention.sum(1)

    def always(self, tokens: Tokens) -> Tensor | None:
        """Tokens of a pool that come before all others, bool `[B, N]`, whatever their importance; None for none."""
        return None

    def score(self, tokens: Tokens) -> Tensor:
        """Score `[B, N]` of a pool's tokens; those with the highest are kept."""
        return scored(tokens.importance, self.always(tokens))

    def budget(self, tokens: Tokens) -> Tensor:
        """How many of a pool's tokens `[B]` are kept at most."""
        return share_of(tokens.seen, self.kept)


def scored(importance: Tensor, always: Tensor | None) -> Tensor:
    """Importance `[B, N]`, and more than that for the tokens that come before all others."""
    return importance if always is None else importance.masked_fill(always, float("inf"))


def share_of(count: Tensor, share: float) -> Tensor:
    """That share of some counts, rounded up."""
    return (count.double() * share - ROUNDING).ceil().to(torch.int32)


def at_positions(by_position: Tensor, positions: Tensor) -> Tensor:
    """Values `[B, slots]` of `[B, T]` at the slots' positions; 0 in empty slots and past the end."""
    inside = (positions >= 0) & (positions < by_position.shape[1])
    found = by_position.gather(1, positions.clamp(0, max(by_position.shape[1] - 1, 0)).long())
    return torch.where(inside, found, 0.0)


def to_positions(values: Tensor, positions: Tensor, tokens: int) -> Tensor:
    """The inverse of `at_positions`: `[B, tokens]`, 0 where no slot holds the position."""
    out = values.new_zeros(values.shape[0], tokens + 1)
    inside = (positions >= 0) & (positions < tokens)
    return out.scatter(1, torch.where(inside, positions.long(), tokens), values)[:, :tokens]


def by_importance(importance: Tensor, occupied: Tensor | None) -> Tensor:
    """Slots `[B, N]`, most important first, empty ones last, equal ones in order; None where none is empty."""
    score = importance if occupied is None else importance.masked_fill(~occupied, float("-inf"))
    return score.argsort(dim=1, descending=True, stable=True)


def most_scored(score: Tensor, budget: Tensor, tokens: Tokens) -> Tensor:
    """Bool `[B, N]`: slots of the `budget` `[B]` tokens at most with the highest scores `[B, N]`, of equal ones the oldest."""
    oldest_first = tokens.place.argsort(dim=1)
    order = by_importance(score.gather(1, oldest_first), tokens.held.gather(1, oldest_first))
    return tokens.held & (rank_of(oldest_first.gather(1, order)) < budget[:, None])


def places_of(positions: Tensor, held: Tensor) -> Tensor:
    """Which of its row's tokens, oldest first, each slot `[B, N]` has."""
    return rank_of(positions.long().masked_fill(~held, 2**62).argsort(dim=1, stable=True))


def newest_without_gap(keep: Tensor, positions: Tensor, held: Tensor) -> Tensor:
    """How many of the newest tokens `[B]` are all kept."""
    dropped = places_of(positions, held).masked_fill(~held | keep, -1)
    return held.sum(1) - 1 - torch.nn.functional.pad(dropped, (1, 0), value=-1).amax(1)


def rank_of(order: Tensor) -> Tensor:
    """The inverse permutation: each slot's place in `order` `[B, N]`."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
