"""The tiers of one layer: where its packed tokens are, how important they are, and how many of them a step reads."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from apack_compile.cache.packed_pair import PackedPair
from apack_compile.cache.token_index import extended
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

# Segments that hold what may be evicted, by modality.
PACKED = {"vision": VISION, "text": TEXT}


class LayerTiers:
    """Per layer, because each layer orders and evicts its tokens by its own attention.

    positions: int32 `[B, slots]` of first, vision, text. importance: float32 `[B, slots]` of vision, text (empty where no rule
    needs it). counts: `read` int32 `[B, 2]`, leading vision slots read in full and read at all, and `seen` int32 `[B, 2]`,
    vision and text tokens so far. began, end: first position of the newest chunk, and what was counted. settled: importance has been
    observed since the last layout; earlier: by position, what it was before that, until it is observed again.
    """

    def __init__(self, rule: TierRule, batch: int, device: torch.device) -> None:
        empty = torch.empty(batch, 0, dtype=torch.int32, device=device)
        self.rule = rule
        self.positions = [empty, empty.clone(), empty.clone()]
        self.importance = [empty.float(), empty.float()]
        self.counts = [torch.zeros(batch, 2, dtype=torch.int32, device=device) for _ in range(2)]
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
        return [*self.positions, *self.importance, *self.counts]

    def batched(self) -> list[list[Tensor]]:
        """The lists whose tensors have a row per sequence."""
        return [self.positions, self.importance, self.counts]

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

    def lay_out(self, positions: list[Tensor], where: Mapping[int, Tensor], end: int) -> None:
        """Follow a layout of everything anew; `where` is -1 for evicted tokens."""
        self._remember_importance()
        self._count(positions, self.end, end)
        self.began = self.end
        self.positions = [positions[0].clone(), *(positions[s].masked_fill(where[s] < 0, -1) for s in (VISION, TEXT))]
        self._unsettle(end)

    def add_chunk(self, positions: list[Tensor], used: Mapping[int, int], began: int, end: int) -> None:
        """Follow a layout of a chunk behind the `used` slots."""
        self._remember_importance()
        self.counts[1] = self.seen + torch.tensor([0, began - self.end], dtype=torch.int32, device=self.seen.device)
        self._count(positions, began, end)
        self.began = began
        old = [self.positions[0], *(self.positions[s][:, : used[s]] for s in (VISION, TEXT))]
        self.positions = [torch.cat(pair, 1) for pair in zip(old, positions, strict=True)]
        self._unsettle(end)

    def _count(self, positions: list[Tensor], began: int, end: int) -> None:
        new = [(positions[s] >= began) & (positions[s] < end) for s in (VISION, TEXT)]
        self.counts[1] = self.seen + torch.stack([flags.sum(1, dtype=torch.int32) for flags in new], 1)

    def _remember_importance(self) -> None:
        pairs = zip(self.importance, self.positions[1:], strict=True)
        self.earlier = [to_positions(x, p, int(p.max()) + 1) if x.numel() else x for x, p in pairs if self.settled]

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
            self.seen[:, 1] -= self.end - held
            self.end = held
        if self.importance[1].numel():
            self.importance[1].masked_fill_(self.positions[TEXT] >= held, 0.0)

    def count_text(self, end: int) -> None:
        """Count the text before position `end` as seen."""
        self.seen[:, 1] += end - self.end
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

    def keep_vision(self, pair: PackedPair, keep: Tensor) -> PackedPair:
        """The vision tokens in the slots `keep`, bool `[B, slots]`; positions and importance follow."""
        self.has_evicted, count = True, keep.sum(1)
        most = int(count.max())
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

    def keep_text(self, codes: list[Tensor], keep: Tensor, end: int) -> tuple[int, int]:
        """Of the text tokens before position `end`, in the first slots, move those to `keep` `[B, slots]` to the front, in place.

        Gives the slots that they have then, in order of position, and how many of the newest are contiguous. Slots of later positions
        follow. A row that keeps fewer leaves the leading slots empty, so that the newest tokens have the same slots in every row.
        """
        self.has_evicted, used = True, keep.shape[1]
        positions, slots = self.positions[TEXT], self.positions[TEXT].shape[1]
        older = positions[:, :used]
        recent, count = newest_without_gap(keep, older, older >= 0), keep.sum(1)
        most = int(count.max()) if len(count) else 0
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
        return most, int(recent.min())

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
