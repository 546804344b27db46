"""Turning the keys of a block of slots back by the position where the block starts (docs/architecture.md, "Relative keys")."""

import torch
from torch import Tensor


def turned(x: Tensor, turns: Tensor, back: bool = False) -> Tensor:
    """Keys or queries `[..., D]` turned by `turns` `[..., 2, P]`, cosine and sine per pair; in `x`'s dtype.

    Component i of a head turns with component i + P; components from 2 P on stay.
    """
    pairs = turns.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    cosine, sine = turns.to(x.dtype).unbind(-2)
    if back:
        sine = -sine
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def turns_of_slots(turns: Tensor, block: int, slots: Tensor) -> Tensor:
    """Turns `[B, n, 2, P]` of slots `[n]`, from those of their blocks `[B, blocks, 2, P]`."""
    return turns.index_select(1, slots // block)
