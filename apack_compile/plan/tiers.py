"""Tiers: which packed tokens a decode step reads, and how much of them; which are kept at all."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from apack_compile.kernels.autocast import without_autocast

# Shares are rounded up, but 0.3 * 10 is 3.
ROUNDING = 1e-9


@dataclass(frozen=True)
class TextEviction:
    """A-VL's rule for text (arXiv 2409.14846): the first tokens, the newest and the heavy hitters of what was seen.

    kept: share of the text tokens seen so far. first: tokens kept at the start. heavy: heavy hitters' share of the rest.
    every: decode steps between prunings.
    """

    kept: float
    first: int
    heavy: float
    every: int


@dataclass(frozen=True)
class TierPlan:
    """Tiers of vision tokens, as shares of a row's vision tokens at prefill; a share is rounded up to whole tokens.

    full: read with all value components. partial: leading share of the value components that the others are read with.
    attended: read at a step at all. kept: not evicted after prefill. refresh_every: decode steps between two choices by
    importance; where fewer are attended than kept, every so many steps all are attended, and chosen from anew after it.
    ema: of importance, vision's keep and add, then text's.
    """

    full: float = 1.0
    partial: float = 1.0
    attended: float = 1.0
    kept: float = 1.0
    refresh_every: int = 1
    ema: tuple[float, float, float, float] = (0.25, 0.75, 0.25, 0.75)
    text: TextEviction | None = None

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("full", "partial", "attended", "kept")}
        for name, share in shares.items():
            if not 0 <= share <= 1 or (share == 0 and name != "full"):
                raise ValueError(f"tiers: {name}={share!r} must be > 0 and at most 1 (full may be 0)")
        if self.refresh_every < 1 or (self.text is not None and self.text.every < 1):
            raise ValueError(f"tiers: refresh_every={self.refresh_every!r} and text.every must be integers >= 1")
        if len(self.ema) != 4 or not all(math.isfinite(weight) and weight >= 0 for weight in self.ema):
            raise ValueError(f"tiers: ema={self.ema!r} must be four finite numbers >= 0")

    @property
    def revisits(self) -> bool:
        """Whether all kept tokens are attended once in a while."""
        return self.attended < self.kept


def share_of(count: Tensor, share: float) -> Tensor:
    """That share of some counts, rounded up."""
    return (count.double() * share - ROUNDING).ceil().to(torch.int32)


@torch.compiler.disable
@without_autocast
def newest_attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, row: Tensor) -> Tensor:
    """Head-mean attention `[B, T]`, float32, of the query at `row` `[B]` of `[B, H_q, n, D]` over keys `[B, H, T, D]`.

    mask: as for scaled_dot_product_attention, or None for causal. One query per row: no attention matrix is built.
    """
    batch, heads, rows, head_dim = query.shape
    chosen = query.gather(2, row[:, None, None, None].expand(batch, heads, 1, head_dim)).float() * scale
    grouped = chosen.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ key.float().mT).flatten(1, 2)
    columns = torch.arange(key.shape[2], device=key.device)
    if mask is None:
        scores = scores.masked_fill((columns > row[:, None] + key.shape[2] - rows)[:, None], float("-inf"))
    else:
        full = mask.expand(batch, -1, rows, -1)
        at_row = full.gather(2, row[:, None, None, None].expand(batch, full.shape[1], 1, full.shape[3]))[:, :, 0]
        hidden = ~at_row if mask.dtype == torch.bool else None
        scores = scores + at_row.float() if hidden is None else scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0).mean(1)


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


def by_importance(importance: Tensor, occupied: Tensor) -> Tensor:
    """Slots `[B, N]`, most important first, empty ones last, equal ones in order."""
    return importance.masked_fill(~occupied, float("-inf")).argsort(dim=1, descending=True, stable=True)


def kept_text(
    importance: Tensor, positions: Tensor, held: Tensor, seen: Tensor, rule: TextEviction
) -> tuple[Tensor, Tensor]:
    """Text slots to keep, bool `[B, N]`, and how many of the newest tokens they hold without a gap, at least, `[B]`.

    held: bool `[B, N]`, slots with a token. seen: text tokens so far `[B]`.
    """
    age = rank_of(positions.long().masked_fill(~held, 2**62).argsort(dim=1, stable=True))
    count = held.sum(1)
    budget = torch.minimum(share_of(seen, rule.kept).long().clamp_min(rule.first), count)
    first = budget.clamp_max(rule.first)
    heavy = share_of(budget - first, rule.heavy).long()
    recent = budget - first - heavy
    kept = held & ((age < first[:, None]) | (age >= (count - recent)[:, None]))
    weight = rank_of(by_importance(importance, held & ~kept))
    return kept | (held & (weight < heavy[:, None])), recent


def rank_of(order: Tensor) -> Tensor:
    """The inverse permutation: each slot's place in `order` `[B, N]`."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
