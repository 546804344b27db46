"""Which token lives in which slot: shared by all layers of a cache.

What is known of a chunk before its states are is worked out on the host, in numpy arrays: it is tensors that a device has to be waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apack_compile.plan.plan import MODALITIES, Plan

# How many of a prompt's newest tokens can be cropped at least.
MAX_CROP = 32

Flags: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """Tokens about to be stored: which are vision, which are padding, bool `[B, n]`; `start` is the first one's position."""

    vision: Flags
    padding: Flags
    start: int


@dataclass(frozen=True)
class Assignment:
    """Where a chunk's tokens go: chunk indices `[B, slots]` per segment, -1 for a slot left empty.

    The last `recent` tokens are text in every row and have the same slots in every row, so that they can be cropped; the last
    `tail` of them go to the tail.
    """

    first: Indices
    vision: Indices
    text: Indices
    recent: int
    tail: int


def compact(flags: Flags) -> Indices:
    """Indices `[B, most]` of the set flags of each row `[B, n]`, in order, padded with -1."""
    counts = flags.sum(1)
    order = np.argsort(~flags, axis=1, kind="stable")[:, : int(counts.max(initial=0))]
    return np.where(np.arange(order.shape[1]) < counts[:, None], order, -1)


def compact_to_the_right(flags: Flags) -> Indices:
    """As `compact`, padded with -1 in front: the newest token of every row has the last slot."""
    return mirrored(compact(flags[:, ::-1]), flags.shape[1])


def mirrored(index: Indices, tokens: int) -> Indices:
    """Indices `[B, N]` into so many tokens, counted from the other end, in the other order."""
    return np.where(index >= 0, tokens - 1 - index, -1)[:, ::-1]


def flags_at(index: Indices, tokens: int) -> Flags:
    """The inverse of `compact`: bool `[B, tokens]`, set at the indices `[B, N]` that are not -1."""
    flags = np.zeros((len(index), tokens + 1), bool)
    np.put_along_axis(flags, index, True, axis=1)
    return flags[:, :tokens]


def assign(
    chunk: Chunk, first_tokens: int | Indices, tail_slots: int, drafted: int = 0, window: int | None = None
) -> Assignment:
    """Split a chunk: the first real tokens of each row, the newest text that every row has, the rest.

    The newest text can be cropped: `drafted` tokens of it or more, where there are so many. window: newest tokens that a query
    sees; older ones have no place, however many are cropped.
    """
    real = ~chunk.padding
    tokens = real.shape[1]
    first = real & (real.cumsum(1) <= first_tokens)
    text = real & ~first & ~chunk.vision
    run = int(np.all(text, axis=0)[::-1].cumprod().sum())
    tail, recent = min(tail_slots, run), min(max(tail_slots, MAX_CROP, drafted), run)
    column = np.arange(tokens)
    older = column < tokens - recent
    packed_recent = np.broadcast_to(column[tokens - recent : tokens - tail], (len(real), recent - tail))
    if window is None:
        vision = compact(real & ~first & chunk.vision & older)
        return Assignment(
            compact(first), vision, np.concatenate([compact(text & older), packed_recent], 1), recent, tail
        )
    seen = column > tokens - recent - window
    vision = compact(real & ~first & chunk.vision & older & seen)
    # each slot holds about the same position in every row, so that a block of slots is out of the window in all rows at once
    text_slots = np.concatenate([compact_to_the_right(text & older & seen), packed_recent], 1)
    return Assignment(compact(first & seen), vision, text_slots, recent, tail)


# Slots of a segment in a new order, or how many of the leading ones.
Kept: TypeAlias = int | Tensor


def kept_slots(x: Tensor, kept: Kept, dim: int) -> Tensor:
    """The kept slots of dimension `dim`."""
    return x.narrow(dim, 0, kept) if isinstance(kept, int) else x.index_select(dim, kept)


def count_of(kept: Kept) -> int:
    """How many slots are kept."""
    return kept if isinstance(kept, int) else len(kept)


@dataclass(frozen=True)
class Taken:
    """Which of a chunk's tokens go into some slots, as all layers take them.

    index: int64 `[N]` where all rows take the same ones, else `[B, N]`; 0 for a slot left empty. start: the first one where they follow one
    another. real: bool `[B, N]`, the slots with a token; None for all. tokens: of all rows, empty slots left out. wide: index and real as
    `[B, 1, N, 1]`, where there are more rows, and empty slots.
    """

    index: Tensor
    start: int | None
    real: Tensor | None
    tokens: int
    wide: tuple[Tensor | None, Tensor | None]

    @staticmethod
    def of_tensors(index: Tensor, start: int | None, real: Tensor | None, tokens: int) -> "Taken":
        """These tokens."""
        wide = None if index.dim() == 1 else index[:, None, :, None]
        return Taken(index, start, real, tokens, (wide, None if real is None else real[:, None, :, None]))

    @staticmethod
    def at(index: Indices, device: torch.device) -> "Taken":
        """Those at indices `[B, N]`, -1 for a slot left empty."""
        real, slots = index >= 0, index.shape[1]
        tokens, is_same = int(real.sum()), bool((index == index[:1]).all())
        is_full = tokens == index.size
        follow = is_same and is_full and slots > 0 and bool((np.diff(index[0]) == 1).all())
        start = int(index[0, 0]) if follow else None
        wanted = (index[0] if is_same else index).clip(0)
        return Taken.of_tensors(there(wanted, device), start, None if is_full else there(real, device), tokens)

    @property
    def slots(self) -> int:
        """Slots, empty ones included."""
        return self.index.shape[-1]

    def of(self, x: Tensor) -> Tensor:
        """Tokens `[B, H, slots, D]` of `[B, H, n, D]`, which may be a view; zeros in empty slots."""
        return self.copied(x) if self.start is None else x.narrow(2, self.start, self.slots)

    def copied(self, x: Tensor) -> Tensor:
        """The same in memory of their own."""
        index, real = self.wide
        if index is None:
            # copies whole rows, several times faster than a gather
            found = x.index_select(2, self.index)
        else:
            found = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
        return found if real is None else found.mul_(real)

    def values(self, by_token: Tensor) -> Tensor:
        """Values `[B, slots]` of tokens with `[B, n]`; 0 in empty slots."""
        if self.index.dim() == 1:
            found = by_token.index_select(1, self.index)
        else:
            found = by_token.gather(1, self.index)
        return found if self.real is None else found.mul_(self.real)


def there(x: NDArray, device: torch.device) -> Tensor:
    """What is known on the host, on a device; nobody waits for it."""
    return torch.from_numpy(np.array(x, order="C")).to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[NDArray]:
    """Tensors of flags and numbers, int64, on the host: one wait for a device, however many there are."""
    if not tensors:
        return []
    flat = torch.cat([x.reshape(-1).long() for x in tensors]).cpu().numpy()
    ends = np.cumsum([x.numel() for x in tensors])
    return [part.reshape(x.shape) for part, x in zip(np.split(flat, ends[:-1]), tensors, strict=True)]


def positions_of(index: Indices, start: int) -> NDArray[np.int32]:
    """int32 positions of chunk indices; -1 stays -1."""
    return np.where(index >= 0, index + start, -1).astype(np.int32)


def extended(positions: Tensor, start: int, count: int) -> Tensor:
    """Positions `[B, slots]` with `count` more slots, for the tokens from position `start` on."""
    more = torch.arange(start, start + count, dtype=torch.int32, device=positions.device)
    return torch.cat([positions, more.expand(positions.shape[0], -1)], dim=1)


def without_bad_bargains(assignment: Assignment, plan: Plan, width: int) -> Assignment:
    """Leave a modality dense, behind the first tokens, where its own bases would cost more than packing saves.

    Per row and stream, rank r and N tokens of width W: packed r (N + W), dense N W; rows that share a basis share its r W.
    """
    layer = next(iter(plan.layers.values()))
    for modality in MODALITIES:
        index: Indices = getattr(assignment, modality)
        tokens = index.shape[1]
        key, value = layer.pair(modality)
        basis_width = width / len(index) if key.scope == "batch" else width
        rank = (key.bands.components + value.bands.components) / 2
        if tokens and rank * (tokens + basis_width) >= tokens * width:
            first = np.concatenate([assignment.first, index], 1)
            changed: dict[str, Any] = {modality: index[:, :0]}
            assignment = replace(assignment, first=first, **changed)
    return assignment
