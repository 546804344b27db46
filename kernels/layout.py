"""Heads and head groups, and which slots of a state hold a token."""

import torch
from torch import Tensor

# cursor[HELD]: tokens held; cursor[PACKED]: first position of the tail; position p packs into text slot p - cursor[ORIGIN].
HELD, PACKED, ORIGIN = 0, 1, 2


def to_groups(x: Tensor, groups: int) -> Tensor:
    """Heads `[B, H, N, D]` as head groups `[B, G, N, W_g]`."""
    batch, heads, tokens, head_dim = x.shape
    x = x.reshape(batch, groups, heads // groups, tokens, head_dim)
    return x.transpose(2, 3).reshape(batch, groups, tokens, heads // groups * head_dim)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """Head groups `[B, G, N, W_g]` as heads `[B, H, N, D]`."""
    batch, groups, tokens, width = x.shape
    head_dim = width * groups // heads
    x = x.reshape(batch, groups, tokens, heads // groups, head_dim)
    return x.transpose(2, 3).reshape(batch, heads, tokens, head_dim)


def stored_before(position: Tensor, cursor: Tensor, new_tokens: int) -> Tensor:
    """Which slots `[B, N]` hold a token that came before the `new_tokens` newest, by their positions."""
    end = torch.minimum(cursor[PACKED], cursor[HELD] - new_tokens)
    return (position >= 0) & (position < end)


def tail_positions(slots: int, cursor: Tensor) -> Tensor:
    """Position `[slots]` that each slot of the tail ring would hold; at or past `cursor[HELD]` it is empty."""
    start = cursor[PACKED]
    return start + (torch.arange(slots, device=cursor.device) - start) % max(slots, 1)
