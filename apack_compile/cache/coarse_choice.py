"""Which of a chunk's tokens each layer stores coarsely. What is the same for all layers is worked out once, on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apack_compile.cache.token_index import Assignment, Chunk, Indices, Taken, compact, flags_at, there
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.coarse_rule import NEWEST, CoarseRule, LayerWeights, RotationTable, scores_at
from apack_compile.plan.rotation import KeyRotation


@dataclass(frozen=True)
class Slots:
    """Slots of a segment, which layers fill with the tokens of some ranks, in order of position.

    first, last: the ranks. ranks: the same as int64 `[B, n]` where rows differ, with inside: bool `[B, n]`, those that a row has. behind:
    chunk indices `[B, m]` of the slots behind them, the same in all layers: tokens without a rank, free slots, and what makes the blocks
    of slots whole. real: bool `[B, slots + free]`, the slots with a position; None for all. tokens: of all rows.
    """

    first: int
    last: int
    ranks: Tensor | None
    inside: Tensor | None
    behind: Tensor
    slots: int
    free: int
    real: Tensor | None
    tokens: int

    @staticmethod
    def of(first: Indices, last: Indices, more: Indices, free: Indices, block: int, device: torch.device) -> "Slots":
        """Ranks from `first` up to `last` `[B]`, then tokens `more` `[B, m]`, -1 for none, then `free` `[n]`; block: slots of a block."""
        sizes, rows = last - first, len(first)
        is_even = bool((first == first[0]).all() and (last == last[0]).all())
        column = np.arange(int(sizes.max()))
        inside = column < sizes[:, None]
        held = np.concatenate([inside, more >= 0], 1)
        slots = held.shape[1]
        # one block more than needed: a dimension of 1 would be compiled as a constant
        blocks = -(-(slots + len(free)) // block) + (1 if slots + len(free) else 2) if block else 1
        filler = np.zeros((rows, max((blocks - 1) * block + 1 - slots - len(free), 0)), np.int64)
        behind = np.concatenate([more.clip(0), np.broadcast_to(free, (rows, len(free))), filler], 1)
        real = np.concatenate([held, np.ones((rows, len(free)), bool)], 1)
        ranks = (first[:, None] + column).clip(max=max(int(last.max()) - 1, 0))
        return Slots(
            int(first[0]),
            int(last[0]),
            None if is_even else there(ranks, device),
            None if is_even else there(inside, device),
            there(behind, device),
            slots,
            len(free),
            None if real.all() else there(real, device),
            int(held.sum()),
        )

    def filled(self, order: Tensor) -> Tensor:
        """Chunk indices of the slots and what is behind them, of tokens in the `order` `[B, T]` of their ranks."""
        if self.ranks is None:
            chosen = order[:, self.first : self.last].sort(dim=1).values
        else:
            tokens = order.shape[1]
            # an empty slot is that of token 0: there `rotations_of_blocks` anchors a block that begins with one
            chosen = order.gather(1, self.ranks).masked_fill(~self.inside, tokens).sort(dim=1).values.remainder(tokens)
        return torch.cat([chosen, self.behind], 1)

    def taken(self, indices: Tensor) -> Taken:
        """Which tokens go into the slots."""
        index = indices[0] if len(indices) == 1 else indices
        index = index if index.shape[-1] == self.slots else index[..., : self.slots]
        return Taken.of_tensors(index, None, None if self.real is None else self.real[:, : self.slots], self.tokens)

    def positions(self, indices: Tensor, position: Tensor) -> Tensor:
        """int32 `[B, slots + free]`, of chunk indices whose positions `[T + free]` are these."""
        placed = self.slots + self.free
        found = position.take(indices if indices.shape[1] == placed else indices[:, :placed])
        return found if self.real is None else found.masked_fill_(~self.real, -1)


@dataclass(frozen=True)
class Placed:
    """What a layer stores where: tokens by packed segment, positions of their slots and, where keys are rotated back, rotations."""

    segments: dict[str, Taken]
    positions: list[Tensor]
    rotations: list[Tensor]


@dataclass(frozen=True)
class Same:
    """A packed segment that is the same in all layers: what goes into its slots, their positions and, where keys rotate, rotations."""

    taken: Taken
    positions: Tensor
    rotations: Tensor | None


@dataclass(frozen=True)
class CoarseChoice:
    """How layers choose.

    weights: by layer. hidden: bool `[B, T]`, the chunk's tokens that have no rank. order: the packed segments. told: slots of `coarse`, and
    of the modality that it is told apart from. same: the other packed segment. position: int32 `[T + free]`, of chunk indices. table: how
    the chunk's tokens are rotated; None for keys as they come. block: slots that share one.
    """

    weights: Mapping[int, LayerWeights]
    hidden: Tensor
    order: Sequence[str]
    told: Mapping[str, Slots]
    same: Same
    position: Tensor
    table: RotationTable | None
    block: int

    @property
    def text_slots(self) -> int:
        """Slots of fine text."""
        return self.told["text"].slots if "text" in self.told else self.same.taken.slots

    def of_layer(self, layer: int, key: Tensor, value: Tensor) -> Placed:
        """What a layer with states `[B, H_kv, T, D]` stores where."""
        scores = scores_at(key, value, self.table, self.weights[layer])
        order = scores.masked_fill_(self.hidden, float("inf")).argsort(dim=1, stable=True)
        placed = Placed({}, [], [])
        for name in self.order:
            if name in self.told:
                slots = self.told[name]
                indices = slots.filled(order)
                placed.segments[name] = slots.taken(indices)
                placed.positions.append(slots.positions(indices, self.position))
                if self.table is not None:
                    placed.rotations.append(self.table.at(indices[:, :: self.block]))
            else:
                # a change of the batch may be in place
                placed.segments[name] = self.same.taken
                placed.positions.append(self.same.positions.clone())
                if self.table is not None:
                    placed.rotations.append(self.same.rotations.clone())
        return placed


def coarse_choice(
    rule: CoarseRule,
    rotation: KeyRotation | None,
    chunk: Chunk,
    assignment: Assignment,
    free: int,
    coordinates: TokenCoordinates,
    shape: tuple[int, int, int],
    order: Sequence[str],
    device: torch.device,
) -> CoarseChoice:
    """How layers with states of this shape (KV heads, width of a key and of a value) choose; the newest text is fine.

    free: text slots behind a chunk's.
    """
    tokens, recent = chunk.vision.shape[1], assignment.recent - assignment.tail
    rows, text = len(chunk.vision), assignment.text
    older, newest = np.split(text, [text.shape[1] - recent], axis=1)
    ranked = flags_at(assignment.vision if rule.modality == "vision" else older, tokens)
    candidates = ranked & (np.arange(tokens) < tokens - NEWEST)
    rest = compact(ranked & ~candidates)
    counts = candidates.sum(1)
    coarse = (counts * rule.share).astype(np.int64)
    to_come, none = tokens - assignment.tail + np.arange(free), np.empty(0, np.int64)
    block, zeros = 0 if rotation is None else rotation.block, np.zeros_like(counts)
    fine, same = (rest, none), (text, to_come)
    if rule.modality == "text":
        fine, same = (np.concatenate([rest, newest], 1), to_come), (assignment.vision, none)
    # the tokens of the chunk, and those to come in free slots
    known = np.arange(chunk.start, chunk.start + tokens + max(free - assignment.tail, 0))
    every = np.broadcast_to(known, (rows, len(known)))
    table = None
    if rotation is not None:
        table = RotationTable.of(rotation.at(coordinates.at(there(every, device))), tokens, shape[1])
    slots, position = Slots.of(zeros, zeros, *same, block, device), there(every[0].astype(np.int32), device)
    return CoarseChoice(
        LayerWeights.of_layers(rule.weights, shape, rotation),
        there(~candidates, device),
        order,
        {
            "coarse": Slots.of(zeros, coarse, rest[:, :0], none, block, device),
            rule.modality: Slots.of(coarse, counts, *fine, block, device),
        },
        Same(
            Taken.at(same[0], device),
            slots.positions(slots.behind, position),
            None if table is None else table.at(slots.behind[:, ::block]),
        ),
        position,
        table,
        block,
    )
