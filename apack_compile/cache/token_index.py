"""Which token lives in which slot: shared by all layers of a cache."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from apack_compile.models.modality import compact
from apack_compile.plan.plan import MODALITIES, Plan

# How many of a prompt's newest tokens can be cropped at least.
MAX_CROP = 32


@dataclass(frozen=True)
class Chunk:
    """Tokens about to be stored: which are vision, which are padding, bool `[B, n]`; `start` is the first one's position."""

    vision: Tensor
    padding: Tensor
    start: int


@dataclass(frozen=True)
class Assignment:
    """Where a chunk's tokens go: chunk indices `[B, slots]` per segment, -1 for a slot left empty.

    The last `recent` tokens are text in every row and have the same slots in every row, so that they can be cropped; the last
    `tail` of them go to the tail.
    """

    first: Tensor
    vision: Tensor
    text: Tensor
    recent: int
    tail: int


def compact_to_the_right(flags: Tensor) -> Tensor:
    """As `compact`, padded with -1 in front: the newest token of every row has the last slot."""
    return mirrored(compact(flags.flip(1)), flags.shape[1])


def mirrored(index: Tensor, tokens: int) -> Tensor:
    """Indices `[B, N]` into so many tokens, counted from the other end, in the other order."""
    return torch.where(index >= 0, tokens - 1 - index, -1).flip(1)


def flags_at(index: Tensor, tokens: int) -> Tensor:
    """The inverse of `compact`: bool `[B, tokens]`, set at the indices `[B, N]` that are not -1."""
    flags = torch.zeros(len(index), tokens + 1, dtype=torch.bool, device=index.device)
    return flags.scatter(1, torch.where(index >= 0, index, tokens), True)[:, :tokens]


def assign(
    chunk: Chunk, first_tokens: int | Tensor, tail_slots: int, drafted: int = 0, window: int | None = None
) -> Assignment:
    """Split a chunk: the first real tokens of each row, the newest text that every row has, the rest.

    The newest text can be cropped: `drafted` tokens of it or more, where there are so many. window: newest tokens that a query
    sees; older ones have no place, however many are cropped.
    """
    real = ~chunk.padding
    tokens = real.shape[1]
    first = real & (real.cumsum(1) <= first_tokens)
    text = real & ~first & ~chunk.vision
    run = int(text.all(0).flip(0).cumprod(0).sum())
    tail, recent = min(tail_slots, run), min(max(tail_slots, MAX_CROP, drafted), run)
    column = torch.arange(tokens, device=real.device)
    older = column < tokens - recent
    packed_recent = column[tokens - recent : tokens - tail].expand(len(real), -1)
    if window is None:
        vision = compact(real & ~first & chunk.vision & older)
        return Assignment(compact(first), vision, torch.cat([compact(text & older), packed_recent], 1), recent, tail)
    seen = column > tokens - recent - window
    vision = compact(real & ~first & chunk.vision & older & seen)
    # each slot holds about the same position in every row, so that a block of slots is out of the window in all rows at once
    text_slots = torch.cat([compact_to_the_right(text & older & seen), packed_recent], 1)
    return Assignment(compact(first & seen), vision, text_slots, recent, tail)


# Slots of a segment in a new order, or how many of the leading ones.
Kept: TypeAlias = int | Tensor


def kept_slots(x: Tensor, kept: Kept, dim: int) -> Tensor:
    """The kept slots of dimension `dim`."""
    return x.narrow(dim, 0, kept) if isinstance(kept, int) else x.index_select(dim, kept)


def count_of(kept: Kept) -> int:
    """How many slots are kept."""
    return kept if isinstance(kept, int) else len(kept)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, H, slots, D]` of `[B, H, n, D]` at `[B, slots]` indices; zeros where the index is -1."""
    if len(x) == 1:
        # copies whole rows, several times faster than a gather
        found = x.index_select(2, index[0].clamp_min(0))
    else:
        found = x.gather(2, index.clamp_min(0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return found.mul_((index >= 0)[:, None, :, None].to(x.dtype))


def positions_of(index: Tensor, start: int) -> Tensor:
    """int32 positions of chunk indices; -1 stays -1."""
    return torch.where(index >= 0, index + start, -1).to(torch.int32)


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
        index: Tensor = getattr(assignment, modality)
        tokens = index.shape[1]
        key, value = layer.pair(modality)
        basis_width = width / len(index) if key.scope == "batch" else width
        rank = (key.bands.components + value.bands.components) / 2
        if tokens and rank * (tokens + basis_width) >= tokens * width:
            first = torch.cat([assignment.first, index], dim=1)
            assignment = replace(assignment, first=first, **{modality: index[:, :0]})
    return assignment
