"""Rotating tokens back by the rotation of their block of slots, in Triton; `kernels.rotations` is the specification."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def partner_of(channel, PAIRS: tl.constexpr):
    """The component of a head that each rotates with, itself for those that stay."""
    second = tl.where(channel < 2 * PAIRS, channel - PAIRS, channel)
    return tl.where(channel < PAIRS, channel + PAIRS, second)


@triton.jit
def rotated_back(x, partner, rotations, at_turn, row_ok, channel, PAIRS: tl.constexpr):
    """Components `[rows, channels]` rotated back, given their partners; at_turn: of each row's rotation `[2, P]` in `rotations`."""
    at = rotations + at_turn[:, None] + (channel % PAIRS)[None, :]
    rotations_too = row_ok[:, None] & (channel < 2 * PAIRS)[None, :]
    cosine = tl.load(at, mask=rotations_too, other=1.0).to(tl.float32)
    sine = tl.load(at + PAIRS, mask=rotations_too, other=0.0).to(tl.float32)
    return x * cosine + partner * tl.where((channel < PAIRS)[None, :], sine, -sine)


def pairs_of(rotations: Tensor | None) -> int:
    """Pairs of components that rotate; 0 where keys are not relative."""
    return 0 if rotations is None else rotations.shape[3]
