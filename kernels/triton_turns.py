"""Turning tokens back by the turn of their block of slots, in Triton; `kernels.turns` is the specification."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def partner_of(channel, PAIRS: tl.constexpr):
    """The component of a head that each turns with, itself for those that stay."""
    second = tl.where(channel < 2 * PAIRS, channel - PAIRS, channel)
    return tl.where(channel < PAIRS, channel + PAIRS, second)


@triton.jit
def turned_back(x, partner, turns, at_turn, row_ok, channel, PAIRS: tl.constexpr):
    """Components `[rows, channels]` turned back, given their partners; at_turn: of each row's turn `[2, P]` in `turns`."""
    at = turns + at_turn[:, None] + (channel % PAIRS)[None, :]
    turns_too = row_ok[:, None] & (channel < 2 * PAIRS)[None, :]
    cosine = tl.load(at, mask=turns_too, other=1.0).to(tl.float32)
    sine = tl.load(at + PAIRS, mask=turns_too, other=0.0).to(tl.float32)
    return x * cosine + partner * tl.where((channel < PAIRS)[None, :], sine, -sine)


def pairs_of(turns: Tensor | None) -> int:
    """Pairs of components that turn; 0 where keys are not relative."""
    return 0 if turns is None else turns.shape[3]
