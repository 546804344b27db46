"""The tiers of one layer: where its packed tokens are, how important they are, and how many of them a step reads."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apack_compile.cache.packed_pair import PackedPair
from apack_compile.cache.token_index import Kept, Taken, count_of, extended
from apack_compile.kernels.state import TEXT, VISION
from apack_compile.plan.tiers import (
    ROUNDING,
    TierRule,
    Tokens,
    at_positions,
    by_importance,
    most_scored,
    newest_without_gap,
    places_of,
    share_of,
    to_positions,
)

if TYPE_CHECKING:
    from apack_compile.cache.shared_index import ChunkPlan

# Segments that hold what may be evicted, by modality.
PACKED = {"vision": VISION, "text": TEXT}


class LayerTiers:
    """Per layer, because each layer orders and evicts its tokens by its own attention.

    positions: int32 `[B, slots]` of first, vision, text. importance: float32 `[B, slots]` of vision, text (empty where no rule
    needs it). counts: `read` int32 `[B, 2]`, leading vision slots read in full and read at all, and `seen` int32 `[B, 2]`,
    vision and text tokens so far. host: int64 `[B, 2]` on the host, these and how many of them are held, -1 where only the device knows.
    began, end: first position of the newest chunk, and what was counted. settled: importance has been
    observed since the last layout; earlier: by position, what it was before that, until it is observed again.
    """

    def __init__(self, rule: TierRule, batch: int, device: torch.device) -> None:
        empty = torch.empty(batch, 0, dtype=torch.int32, device=device)
        self.rule = rule
        self.positions = [empty, empty.clone(), empty.clone()]
        self.importance = [empty.float(), empty.float()]
        self.counts = [torch.zeros(batch, 2, dtype=torch.int32, device=device) for _ in range(2)]
        self.host = [torch.zeros(batch, 2, dtype=torch.int64) for _ in range(2)]
        self.began = 0
        self.end = 0
        self.settled = False
        self.earlier: list[Tensor] = []
        self.has_evicted = False

    @property
    def read(self) -> Tensor:
        """Leading vision slots `[B, 2]` read in full, and read at all."""
        return self.counts[0]

    @property
    def seen(self) -> Tensor:
        """Vision and text tokens `[B, 2]` so far, evicted ones included."""
        return self.counts[1]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.positions, *self.importance, *self.counts, *self.host]

    def batched(self) -> list[list[Tensor]]:
        """The lists whose tensors have a row per sequence."""
        return [self.positions, self.importance, self.counts, self.host]

    def state(self, components: int) -> tuple:
        """The last arguments of `attend_tiers`, for values of so many components."""
        partial = max(math.ceil(self.rule.partial * components - ROUNDING), 1)
        return *self.importance, self.read, partial, list(self.rule.decay)

    @property
    def evicts_text(self) -> bool:
        """Whether text tokens are evicted, and have importance for that."""
        return any("text" in pool for pool in self.rule.pools)

    def alive(self, end: int) -> Tensor:
        """Bool `[B, end]`: positions that were not evicted; what came after the last layout is."""
        held = torch.zeros(len(self.read), end + 1, dtype=torch.bool, device=self.read.device)
        for positions in self.positions:
            inside = (positions >= 0) & (positions < self.end)
            held.scatter_(1, torch.where(inside, positions.long(), end), True)
        held[:, self.end :] = True
        return held[:, :end]

    def without_evicted(self, where: Mapping[str, Taken], end: int) -> dict[str, Taken]:
        """What a layout of everything anew takes, by modality, without what was evicted."""
        alive, found = self.alive(end), {}
        for name, taken in where.items():
            index = taken.index if taken.index.dim() == 1 else taken.index[:, 0, :, 0]
            stays = alive.gather(1, index.expand(len(alive), -1))
            found[name] = Taken(taken.index, None, stays if taken.real is None else stays & taken.real, taken.tokens)
        return found

    def lay_out(self, positions: list[Tensor], where: Mapping[int, Taken], chunk: "ChunkPlan") -> None:
        """Follow a layout of everything anew; of `where`, evicted tokens are not real."""
        self._remember_importance(chunk.held)
        self._count(chunk.counts(self.end))
        self.began = self.end
        placed = [(positions[s], where[s].real) for s in (VISION, TEXT)]
        self.positions = [
            positions[0].clone(),
            *(p.clone() if real is None else p.masked_fill(~real, -1) for p, real in placed),
        ]
        self._unsettle(chunk.end)

    def add_chunk(self, positions: list[Tensor], used: Mapping[int, Kept], chunk: "ChunkPlan") -> None:
        """Follow a layout of a chunk behind the `used` slots."""
        self._remember_importance(chunk.held)
        new = chunk.counts(chunk.chunk.start)
        new[:, 1] += chunk.chunk.start - self.end
        self._count(new)
        self.began = chunk.chunk.start
        if self.end == 0:
            self.positions = [p.clone() for p in positions]
        else:
            old = [self.positions[0], *(self.positions[s][:, : count_of(used[s])] for s in (VISION, TEXT))]
            self.positions = [torch.cat(pair, 1) for pair in zip(old, positions, strict=True)]
        self._unsettle(chunk.end)

    def _count(self, new: NDArray[np.int64]) -> None:
        """Count vision and text tokens `[B, 2]` that came."""
        more = torch.from_numpy(new)
        seen, held = self.host
        self.host = [seen + more, torch.where(held < 0, held, held + more)]
        self.counts[1] = self.host[0].to(torch.int32).to(self.read.device, non_blocking=True)

    def _count_text(self, tokens: int) -> None:
        """Count text that came or, where negative, went."""
        self.seen[:, 1] += tokens
        self.host = [x + torch.tensor([0, tokens]) for x in self.host]

    def _remember_importance(self, held: int) -> None:
        pairs = zip(self.importance, self.positions[1:], strict=True)
        self.earlier = [to_positions(x, p, held) if x.numel() else x for x, p in pairs if self.settled]

    def _unsettle(self, end: int) -> None:
        self.end = end
        self.importance = [p.new_zeros(p.shape, dtype=torch.float32) for p in self.positions[1:]]
        if not self.evicts_text:
            self.importance[1] = self.importance[1][:, :0]
        self.counts[0] = torch.full_like(self.read, self.positions[VISION].shape[1])
        self.settled = False

    def grow(self, start: int, slots: int) -> None:
        """Add text slots for the positions from `start` on."""
        self.positions[TEXT] = extended(self.positions[TEXT], start, slots)
        if self.evicts_text:
            self.importance[1] = torch.nn.functional.pad(self.importance[1], (0, slots))

    def vision_importance(self, tokens: int) -> Tensor:
        """Importance `[B, tokens]` of vision tokens by position, 0 elsewhere."""
        return to_positions(self.importance[0], self.positions[VISION], tokens)

    def observe(self, importance: Tensor) -> None:
        """Take importance `[B, T]` by position."""
        for i, known in enumerate(self.importance):
            if known.numel():
                self.importance[i] = at_positions(importance.float(), self.positions[1 + i])
        self.earlier = []

    def observe_draft(self, attention: Tensor) -> None:
        """Go on from the importance before a drafted chunk with the attention `[B, T]` of its first token."""
        for i, known in enumerate(self.importance):
            if known.numel():
                keep, add = self.rule.decay[2 * i : 2 * i + 2]
                # what a token pays itself says nothing yet
                by_position, earlier = add * attention[:, : self.began].float(), self.earlier[i][:, : self.began]
                by_position[:, : earlier.shape[1]] += keep * earlier
                self.importance[i] = at_positions(by_position, self.positions[1 + i])
        self.earlier = []

    def crop(self, held: int) -> None:
        """Forget the tokens from position `held` on, which are text in every row."""
        if held < self.end:
            self._count_text(held - self.end)
            self.end = held
        if self.importance[1].numel():
            self.importance[1].masked_fill_(self.positions[TEXT] >= held, 0.0)

    def count_text(self, end: int) -> None:
        """Count the text before position `end` as seen."""
        if end != self.end:
            self._count_text(end - self.end)
        self.end = end

    def chosen(self, pool: tuple[str, ...], used: int) -> dict[str, Tensor]:
        """The tokens of a pool that stay, by modality, bool `[B, slots]`; of text in the first `used` slots."""
        ends = [used if name == "text" else self.positions[PACKED[name]].shape[1] for name in pool]
        placed, known = (
            torch.cat([tensors[PACKED[name] - start][:, :end] for name, end in zip(pool, ends, strict=True)], 1)
            for tensors, start in ((self.positions, 0), (self.importance, VISION))
        )
        held = placed >= 0
        seen = torch.stack([self.seen[:, PACKED[name] - VISION] for name in pool]).sum(0)
        tokens = Tokens(pool, known, held, places_of(placed, held), held.sum(1), seen)
        stay = most_scored(self.rule.score(tokens), self.rule.budget(tokens), tokens)
        return dict(zip(pool, stay.split(ends, 1), strict=True))

    def count_kept(self, pool: tuple[str, ...]) -> None:
        """Count what stays of a pool: as many tokens as the rule's budget, which the host knows where one modality competes."""
        columns = [PACKED[name] - VISION for name in pool]
        seen, held = self.host
        kept = held.clone()
        kept[:, columns] = -1
        if len(pool) == 1 and bool(np.all(np.asarray(held)[:, columns] >= 0)):
            (column,) = columns
            none = torch.empty(len(held), 0)
            tokens = Tokens(pool, none, none, none, held[:, column], seen[:, column])
            kept[:, column] = torch.minimum(self.rule.budget(tokens).clamp_min(0), held[:, column])
        self.host = [seen, kept]

    def most_kept(self, name: str, keep: Tensor) -> int:
        """Most tokens of a modality that a row keeps: those at `keep` `[B, slots]`."""
        known = np.asarray(self.host[1])[:, PACKED[name] - VISION]
        # only the device knows how modalities that compete share a budget
        return int(known.max(initial=0)) if (known >= 0).all() else int(keep.sum(1).max())

    def keep_vision(self, pair: PackedPair, keep: Tensor) -> PackedPair:
        """The vision tokens in the slots `keep`, bool `[B, slots]`; positions and importance follow."""
        self.has_evicted, count = True, keep.sum(1)
        most = self.most_kept("vision", keep)
        order = by_importance(self.importance[0], keep)[:, :most]
        inside = torch.arange(most, device=order.device) < count[:, None]
        self.positions[VISION] = self.positions[VISION].gather(1, order).masked_fill(~inside, -1)
        self.importance[0] = self.importance[0].gather(1, order)
        return pair.with_tokens(lambda x: select_slots(x, order))

    def rank(self, codes: list[Tensor]) -> None:
        """Put the vision slots in the order of their importance, in place; the most important are read."""
        order = by_importance(self.importance[0], self.positions[VISION] >= 0)
        for tensor in (*codes, self.positions[VISION], self.importance[0]):
            if tensor.dim() > 1:
                tensor.copy_(select_slots(tensor, order))
        read = (share_of(self.seen[:, 0], share) for share in (self.rule.full, self.rule.attended))
        self.read.copy_(torch.stack(list(read), 1))

    def attend_all(self) -> None:
        """Read every vision slot at the next step."""
        self.read.fill_(self.positions[VISION].shape[1])

    def keep_text(self, codes: list[Tensor], keep: Tensor, end: int) -> tuple[int, Tensor]:
        """Of the text tokens before position `end`, in the first slots, move those to `keep` `[B, slots]` to the front, in place.

        Gives the slots that they have then, in order of position, and how many of the newest are contiguous, 0-d. Slots of later positions
        follow. A row that keeps fewer leaves the leading slots empty, so that the newest tokens have the same slots in every row.
        """
        self.has_evicted, used = True, keep.shape[1]
        positions, slots = self.positions[TEXT], self.positions[TEXT].shape[1]
        older = positions[:, :used]
        recent, count = newest_without_gap(keep, older, older >= 0), keep.sum(1)
        most = self.most_kept("text", keep)
        last = older.long().masked_fill(~keep, -1).argsort(dim=1, stable=True)
        later = torch.arange(used, slots, device=last.device).expand(len(last), -1)
        order = torch.cat([last[:, used - most :], later, last[:, : used - most]], 1)
        for tensor in (*codes, self.importance[1]):
            if tensor.dim() > 1:
                tensor.copy_(select_slots(tensor, order))
        moved = positions.gather(1, order)
        column = torch.arange(slots, device=order.device)
        moved = moved.masked_fill(column < most - count[:, None], -1)
        moved[:, most:] = column[most:] - most + end
        positions.copy_(moved)
        self.importance[1][:, slots - (used - most) :] = 0
        return most, recent.min()

    def keep_text_slots(self, slots: int) -> None:
        """Free the text slots behind the first `slots`."""
        self.positions[TEXT] = self.positions[TEXT][:, :slots].clone()
        self.importance[1] = self.importance[1][:, :slots].clone()


def select_slots(tensor: Tensor, order: Tensor) -> Tensor:
    """Slots `[B, n]` of `[B, N]`, `[B, G, N]` or `[B, G, N, bytes]`; an empty scale stays."""
    if tensor.dim() <= 1:
        return tensor
    if tensor.dim() == 2:
        return tensor.gather(1, order)
    index = order[:, None] if tensor.dim() == 3 else order[:, None, :, None]
    return tensor.gather(2, index.expand(*tensor.shape[:2], order.shape[1], *tensor.shape[3:]))
