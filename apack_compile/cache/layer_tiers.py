"""The tiers of one layer: where its packed tokens are, how important they are, and how many of them a step reads."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apack_compile.cache.first_choice import FirstChoice
from apack_compile.cache.packed_pair import PackedPair
from apack_compile.cache.token_index import Kept, Taken, count_of, extended, there
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
    to_positions,
)

if TYPE_CHECKING:
    from apack_compile.cache.shared_index import ChunkPlan

# Segments that hold what may be evicted, by modality.
PACKED = {"vision": VISION, "text": TEXT}


class LayerTiers:
    """Per layer, because each layer orders and evicts its tokens by its own attention.

    positions: int32 `[B, slots]` of first, vision, text. importance: float32 `[B, slots]` of vision, text (empty where no rule
    needs it). counts: `read` int32 `[B, 2]`, leading vision slots read in full and read at all. host: int64 `[B, 2]`, on the host, vision
    and text tokens so far, evicted ones too, and how many of them are held, -1 where only the device knows. began, end: first position
    of the newest chunk, and what was counted. settled: importance has been observed since the last layout; is_ranked: an eviction has
    ordered the vision slots by it; earlier: by position, what it was before that, until it is observed again. fresh: which tokens of a
    first prompt the slots hold, while they are as they were laid out.
    """

    def __init__(self, rule: TierRule, batch: int, device: torch.device) -> None:
        self.rule, self.device = rule, device
        self.positions: list[Tensor] = []
        self.importance: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.host = [np.zeros((batch, 2), np.int64) for _ in range(2)]
        self.fresh: Mapping[int, Taken] | None = None
        self.began = 0
        self.end = 0
        self.settled = False
        self.earlier: list[Tensor] = []
        self.has_evicted = self.is_ranked = False

    @property
    def read(self) -> Tensor:
        """Leading vision slots `[B, 2]` read in full, and read at all."""
        return self.counts[0]

    @property
    def seen(self) -> NDArray[np.int64]:
        """Vision and text tokens `[B, 2]` so far, evicted ones included."""
        return self.host[0]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.positions, *self.importance, *self.counts]

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch."""
        for tensors in (self.positions, self.importance, self.counts):
            tensors[:] = map(change, tensors)
        self.host = [change(torch.from_numpy(known)).numpy() for known in self.host]

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
            stays = alive.gather(1, taken.index.expand(len(alive), -1))
            stays = stays if taken.real is None else stays & taken.real
            found[name] = Taken.of_tensors(taken.index, None, stays, taken.tokens)
        return found

    def lay_out(self, positions: list[Tensor], where: Mapping[int, Taken], chunk: "ChunkPlan") -> None:
        """Follow a layout of everything anew; of `where`, evicted tokens are not real."""
        self._remember_importance(chunk.held)
        self._count(chunk.counts(self.end))
        self.began, is_first = self.end, not self.positions
        placed = [(positions[s], where[s].real) for s in (VISION, TEXT)]
        self.positions = [
            positions[0].clone(),
            *(p.clone() if real is None or is_first else p.masked_fill(~real, -1) for p, real in placed),
        ]
        self._unsettle(chunk.end)
        self.fresh = where if is_first else None

    def add_chunk(
        self, positions: list[Tensor], used: Mapping[int, Kept], where: Mapping[int, Taken], chunk: "ChunkPlan"
    ) -> None:
        """Follow a layout of a chunk, taken as `where` says, behind the `used` slots."""
        self._remember_importance(chunk.held)
        new = chunk.counts(chunk.chunk.start)
        new[:, 1] += chunk.chunk.start - self.end
        self._count(new)
        self.began, is_first = chunk.chunk.start, not self.positions
        if is_first:
            self.positions = [p.clone() for p in positions]
        else:
            old = [self.positions[0], *(self.positions[s][:, : count_of(used[s])] for s in (VISION, TEXT))]
            self.positions = [torch.cat(pair, 1) for pair in zip(old, positions, strict=True)]
        self._unsettle(chunk.end)
        self.fresh = where if is_first else None

    def _count(self, new: NDArray[np.int64]) -> None:
        """Count vision and text tokens `[B, 2]` that came."""
        seen, held = self.host
        self.host = [seen + new, np.where(held < 0, held, held + new)]

    def _count_text(self, tokens: int) -> None:
        """Count text that came or, where negative, went."""
        self._count(np.array([0, tokens]))

    def _remember_importance(self, held: int) -> None:
        pairs = zip(self.importance, self.positions[1:], strict=True)
        self.earlier = [to_positions(x, p, held) if x.numel() else x for x, p in pairs if self.settled]

    def _unsettle(self, end: int) -> None:
        self.end = end
        vision, text = self.positions[1:]
        shapes = vision.shape, text.shape if self.evicts_text else (len(text), 0)
        self.importance = [vision.new_zeros(shape, dtype=torch.float32) for shape in shapes]
        self.counts = [vision.new_full((len(vision), 2), vision.shape[1])]
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
                self.importance[i] = self._at_slots(importance.float(), VISION + i)
        self.earlier = []

    def _at_slots(self, by_position: Tensor, segment: int) -> Tensor:
        """What the tokens in a segment's slots have by position `[B, T]`; 0 in empty slots."""
        positions, fresh = self.positions[segment], None if self.fresh is None else self.fresh[segment]
        if fresh is None or fresh.slots == 0:
            return at_positions(by_position, positions)
        found = fresh.values(by_position)
        more = positions.shape[1] - fresh.slots
        return torch.nn.functional.pad(found, (0, more)) if more else found

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
        seen = self.seen[:, [PACKED[name] - VISION for name in pool]].sum(1)
        tokens = Tokens(pool, known, held, places_of(placed, held), held.sum(1), there(seen, self.device))
        stay = most_scored(self.rule.score(tokens), self.rule.budget(tokens), tokens)
        return dict(zip(pool, stay.split(ends, 1), strict=True))

    def count_kept(self, pool: tuple[str, ...], known: dict[tuple, NDArray[np.int64]]) -> None:
        """Count what stays of a pool: as many tokens as the rule's budget, which the host knows where one modality competes.

        known: what was found for the same counts, which most layers have.
        """
        columns = [PACKED[name] - VISION for name in pool]
        seen, held = self.host
        kept = held.copy()
        kept[:, columns] = -1
        if len(pool) == 1 and (held[:, columns] >= 0).all():
            counts = held[:, columns[0]], seen[:, columns[0]]
            asked = pool, *(tuple(count.tolist()) for count in counts)
            if asked not in known:
                known[asked] = self._budget(pool, *counts)
            kept[:, columns[0]] = known[asked]
        self.host = [seen, kept]

    def _budget(self, pool: tuple[str, ...], held: NDArray[np.int64], seen: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens `[B]` stay of a pool's `held` ones, worked out on the host."""
        none = torch.empty(len(held), 0)
        tokens = Tokens(pool, none, none, none, torch.from_numpy(held.copy()), torch.from_numpy(seen.copy()))
        return np.minimum(np.asarray(self.rule.budget(tokens)), held).clip(0)

    def most_kept(self, name: str) -> int | None:
        """Most tokens of a modality that a row keeps; None where only the device knows."""
        known = self.host[1][:, PACKED[name] - VISION]
        return int(known.max(initial=0)) if (known >= 0).all() else None

    def keep_vision(self, pair: PackedPair, keep: Tensor, most: int) -> PackedPair:
        """The vision tokens in the slots `keep`, bool `[B, slots]`, `most` in a row; positions and importance follow."""
        self.has_evicted, count = True, keep.sum(1)
        order = by_importance(self.importance[0], keep)[:, :most]
        inside = torch.arange(most, device=order.device) < count[:, None]
        self.positions[VISION] = self.positions[VISION].gather(1, order).masked_fill(~inside, -1)
        self.importance[0] = self.importance[0].gather(1, order)
        return pair.with_tokens(picker(order))

    def rank(self, pair: PackedPair) -> PackedPair:
        """The vision slots in the order of their importance, the most important read; in place, unless they were laid out just now."""
        is_full = self.fresh is not None and not self.has_evicted and self.fresh[VISION].real is None
        order = by_importance(self.importance[0], None if is_full else self.positions[VISION] >= 0)
        pick = picker(order)
        if not self.settled:
            self.positions[VISION], self.importance[0] = pick(self.positions[VISION]), pick(self.importance[0])
            pair = pair.with_tokens(pick)
        else:
            for tensor in (*pair.tensors, self.positions[VISION], self.importance[0]):
                if tensor.dim() > 1:
                    tensor.copy_(pick(tensor))
        self.read_some()
        return pair

    def read_some(self) -> None:
        """Read as many vision slots as the rule says."""
        seen = self.seen[:, :1]
        shares = np.array([[self.rule.full, self.rule.attended]])
        read = there(np.ceil(seen * shares - ROUNDING).astype(np.int32), self.device)
        if self.settled:
            self.read.copy_(read)
        else:
            self.counts = [read]

    def choose_vision(self, pair: PackedPair, choice: FirstChoice) -> PackedPair:
        """Of a first prompt, the vision tokens that stay, most important first; positions and importance follow."""
        self.has_evicted, self.is_ranked = True, choice.always is None
        order = choice.by_importance(self.importance[0])
        placed = self.positions[VISION].gather(1, order)
        self.positions[VISION] = placed if choice.fewer is None else placed.masked_fill_(choice.fewer, -1)
        self.importance[0] = self.importance[0].gather(1, order)
        return pair.with_tokens(picker(order))

    def choose_text(self, pair: PackedPair, choice: FirstChoice) -> tuple[PackedPair, Tensor]:
        """Of a first prompt, the text tokens that stay, as `keep_text` leaves them, and a `Floor`'s `recent`."""
        self.has_evicted = True
        slots, is_next = choice.in_order(self.importance[1])
        order = torch.cat([slots, choice.later], 1)
        if choice.fewer is not None:
            order = order.clamp_min(0)
        self.positions[TEXT] = self.positions[TEXT].gather(1, order)
        self.importance[1] = self.importance[1].gather(1, order)
        if choice.fewer is not None:
            self.positions[TEXT][:, : choice.most].masked_fill_(slots < 0, -1)
        return pair.with_tokens(picker(order)), is_next

    def attend_all(self) -> None:
        """Read every vision slot at the next step."""
        self.read.fill_(self.positions[VISION].shape[1])

    def keep_text(self, codes: list[Tensor], keep: Tensor, end: int, most: int) -> tuple[int, Tensor]:
        """Of the text tokens before position `end`, in the first slots, move those to `keep` `[B, slots]`, `most` in a row, to the front.

        Gives the slots that they have then, in order of position, and how many of the newest are contiguous, 0-d. Slots of later positions
        follow. A row that keeps fewer leaves the leading slots empty, so that the newest tokens have the same slots in every row.
        """
        self.has_evicted, used = True, keep.shape[1]
        positions, slots = self.positions[TEXT], self.positions[TEXT].shape[1]
        older = positions[:, :used]
        recent, count = newest_without_gap(keep, older, older >= 0), keep.sum(1)
        last = older.long().masked_fill(~keep, -1).argsort(dim=1, stable=True)
        later = torch.arange(used, slots, device=last.device).expand(len(last), -1)
        order = torch.cat([last[:, used - most :], later, last[:, : used - most]], 1)
        pick = picker(order)
        for tensor in (*codes, self.importance[1]):
            if tensor.dim() > 1:
                tensor.copy_(pick(tensor))
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


def picker(order: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives the slots `order` `[B, n]` of `[B, N]`, `[B, G, N]` or `[B, G, N, bytes]`; an empty scale stays."""
    if len(order) == 1:
        row = order[0]
        return lambda x: x if x.dim() <= 1 else x.index_select(1 if x.dim() == 2 else 2, row)
    # keys and values often have the same shape
    expanded: dict[tuple[int, ...], Tensor] = {}

    def pick(x: Tensor) -> Tensor:
        if x.dim() <= 2:
            return x if x.dim() <= 1 else x.gather(1, order)
        shape = (*x.shape[:2], order.shape[1], *x.shape[3:])
        if shape not in expanded:
            expanded[shape] = order.view(len(order), 1, -1, *[1] * (x.dim() - 3)).expand(shape)
        return x.gather(2, expanded[shape])

    return pick
