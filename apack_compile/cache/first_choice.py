"""Which tokens of a first prompt stay, where a preset evicts some: its slots are in order yet, and how many stay is known on the host.

So a layer sorts by importance and takes what stays. All else is the same in every layer, and is worked out by the first one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from apack_compile.cache.token_index import there
from apack_compile.kernels.state import VISION
from apack_compile.plan.tiers import TierRule, Tokens, scored

if TYPE_CHECKING:
    from apack_compile.cache.layer_tiers import LayerTiers


@dataclass(frozen=True)
class Floor:
    """First position that can be cropped after an eviction of text before position `end`, which only the device knows.

    recent: 0-d, how many of the newest tokens before `end` all stay; or bool `[B, n]`, which of the newest stay without a gap behind them.
    """

    end: int
    recent: Tensor


def highest(floors: Sequence[Floor]) -> int:
    """The highest of some floors of layers; waits for the device once."""
    alike: dict[tuple, list[Tensor]] = {}
    for floor in floors:
        alike.setdefault((floor.end, floor.recent.shape), []).append(floor.recent)
    found = []
    for (end, _), recent in alike.items():
        stacked = torch.stack(recent)
        if stacked.dim() > 1:
            stacked = stacked.flip(2).cumprod(2).sum(2)
        found.append(end - stacked.amin())
    return int(torch.stack(found).max())


@dataclass(frozen=True)
class FirstChoice:
    """What all layers know of the tokens of a modality in the first `used` slots.

    hidden: bool `[B, used]`, empty slots; None for none. always: as the rule says. most: tokens that a row keeps at most; fewer: bool
    `[B, most]`, those that it has not, None where all rows keep as many. place: which of its row's tokens a slot has; newest: those of the
    `most` newest, int64 `[B, most]`. later: int64 `[B, n]`, the slots behind.
    """

    used: int
    hidden: Tensor | None
    always: Tensor | None
    most: int
    fewer: Tensor | None
    place: Tensor
    newest: Tensor
    later: Tensor

    @staticmethod
    def of(tiers: "LayerTiers", name: str, used: int) -> "FirstChoice":
        """Of a layer whose counts are known; it has not evicted any token yet."""
        column = ("vision", "text").index(name)
        kept, seen = tiers.host[1][:, column], tiers.host[0][:, column]
        held = tiers.positions[VISION + column][:, :used] >= 0
        place, most = held.cumsum(1) - 1, int(kept.max(initial=0))
        # before anything was evicted, what was seen is held
        counts = [there(seen, tiers.device) for _ in range(2)]
        tokens = Tokens((name,), tiers.importance[column][:, :used], held, place, *counts)
        newest = seen[:, None] - most + np.arange(most)
        fewer = np.arange(most) >= kept[:, None]
        behind = np.arange(used, tiers.positions[VISION + column].shape[1])
        later = np.broadcast_to(behind, (len(kept), len(behind)))
        return FirstChoice(
            used,
            None if (seen == used).all() else ~held,
            tiers.rule.always(tokens),
            most,
            there(fewer, tiers.device) if fewer.any() else None,
            place,
            there(newest, tiers.device),
            there(later, tiers.device),
        )

    def by_importance(self, importance: Tensor) -> Tensor:
        """Slots `[B, most]` of the tokens that stay, by their importance `[B, slots]`; of a row with fewer the last ones are any."""
        score = scored(importance if importance.shape[1] == self.used else importance[:, : self.used], self.always)
        if self.hidden is not None:
            score = score.masked_fill(self.hidden, float("-inf"))
        return score.argsort(dim=1, descending=True, stable=True)[:, : self.most]

    def in_order(self, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Slots `[B, most]` of the tokens that stay, in order, and which of them would be there if the newest all stayed, bool.

        Of a row with fewer the first ones are -1.
        """
        slots = self.by_importance(importance)
        if self.fewer is not None:
            slots = slots.masked_fill(self.fewer, -1)
        slots = slots.sort(dim=1).values
        is_next = self.place.gather(1, slots if self.fewer is None else slots.clamp_min(0)) == self.newest
        if self.fewer is not None:
            is_next &= slots >= 0
        return slots, is_next


def can_choose(tiers: "LayerTiers", pools: Sequence[tuple[str, ...]]) -> bool:
    """Whether a layer's tokens are as they were laid out, of one prompt, and the host knows how many stay."""
    known = all(len(pool) == 1 for pool in pools) and bool((tiers.host[1] == tiers.host[0]).all())
    return tiers.fresh is not None and known and type(tiers.rule).score is TierRule.score
