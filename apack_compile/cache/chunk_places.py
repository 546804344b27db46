"""What the layers of a cache must know of a chunk's states, and of what they hold, before a chunk is laid out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apack_compile.cache.token_index import Chunk, Indices


@dataclass(frozen=True)
class Shape:
    """Of the states of a chunk: rows, KV heads, width of a key and of a value, their dtype and where they are."""

    batch: int
    heads: int
    key: int
    value: int
    dtype: torch.dtype
    device: torch.device

    @property
    def offered(self) -> tuple[Tensor, Tensor]:
        """K and V of no tokens, on no device."""
        shapes = ((self.batch, self.heads, 0, dim) for dim in (self.key, self.value))
        key, value = (torch.empty(shape, dtype=self.dtype, device="meta") for shape in shapes)
        return key, value

    @property
    def width(self) -> int:
        """Components of a key in all heads."""
        return self.heads * self.key

    @property
    def of_state(self) -> tuple[int, int, int]:
        """KV heads, width of a key and of a value."""
        return self.heads, self.key, self.value


@dataclass(frozen=True)
class Before:
    """What layers with one index hold before a chunk, on the host: tokens held, first position of the tail, that of text slot 0.

    first: int32 `[B, slots]`, positions of the first tokens; packed: those of vision and text, of a window.
    """

    cursor: tuple[int, int, int]
    first: NDArray
    packed: Sequence[NDArray] = ()

    @staticmethod
    def of(places: Sequence[NDArray]) -> "Before":
        """What `LayerGroup.places` gives, read; nothing for an empty cache."""
        if not places:
            return Before((0, 0, 0), np.empty(0))
        cursor, first, *packed = places
        return Before((int(cursor[0]), int(cursor[1]), int(cursor[2])), first, packed)


def tail_tokens(start: int, end: int, chunk: Chunk, slots: int) -> Indices:
    """Chunk indices `[B, slots]` of what the tail holds, a ring of the positions from `start` to `end`; -1 for an empty slot."""
    position = start + (np.arange(slots) - start) % max(slots, 1)
    return np.broadcast_to(np.where(position < end, position - chunk.start, -1), (len(chunk.vision), slots))
