"""Rotating the keys of a block of slots back by the position where the block starts (docs/architecture.md, "Relative keys")."""

import torch
from torch import Tensor


def rotated(x: Tensor, rotations: Tensor, back: bool = False) -> Tensor:
    """Keys or queries `[..., D]` rotated by `rotations` `[..., 2, P]`, cosine and sine per pair; in `x`'s dtype.

    Component i of a head rotates with component i + P; components from 2 P on stay. (`deinterleaved` puts others so.)
    """
    pairs = rotations.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    cosine, sine = rotations.to(x.dtype).unbind(-2)
    if back:
        sine = -sine
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def deinterleaved(x: Tensor, pairs: int) -> Tensor:
    """Keys or queries `[..., D]` with components 2 i and 2 i + 1 at i and i + `pairs`; those from 2 `pairs` on stay."""
    return torch.cat([x[..., part] for part in halves_of(pairs)], dim=-1)


def halves_of(pairs: int) -> tuple[slice, slice, slice]:
    """Where the first and the second components of interleaved pairs are, and those that do not rotate."""
    return slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2), slice(2 * pairs, None)


def interleaved(x: Tensor, pairs: int) -> Tensor:
    """Keys `[..., D]` as they were before `deinterleaved`."""
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([torch.stack([first, second], dim=-1).flatten(-2), rest], dim=-1)


def check_pairs(pairs: int, head_dim: int) -> None:
    """Raise ValueError for more interleaved pairs than a head has."""
    if not 0 <= 2 * pairs <= head_dim:
        raise ValueError(f"interleaved_pairs={pairs} must be from 0 to {head_dim // 2} for keys of head_dim {head_dim}")


def rotations_of_slots(rotations: Tensor, block: int, slots: Tensor) -> Tensor:
    """Rotations `[B, n, 2, P]` of slots `[n]`, from those of their blocks `[B, blocks, 2, P]`."""
    return rotations.index_select(1, slots // block)
