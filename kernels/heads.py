"""Heads as head groups, and back."""

from torch import Tensor


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
