"""What a cursor says: which slots of a state hold a token."""

import torch
from torch import Tensor

# cursor[HELD]: tokens held; cursor[PACKED]: first position of the tail; position p packs into text slot p - cursor[ORIGIN].
HELD, PACKED, ORIGIN = 0, 1, 2


def stored_before(position: Tensor, cursor: Tensor, new_tokens: int) -> Tensor:
    """Which slots `[B, N]` hold a token that came before the `new_tokens` newest, by their positions."""
    end = torch.minimum(cursor[PACKED], cursor[HELD] - new_tokens)
    return (position >= 0) & (position < end)


def tail_positions(slots: int, cursor: Tensor) -> Tensor:
    """Position `[slots]` that each slot of the tail ring would hold; at or past `cursor[HELD]` it is empty."""
    start = cursor[PACKED]
    return start + (torch.arange(slots, device=cursor.device) - start) % max(slots, 1)
