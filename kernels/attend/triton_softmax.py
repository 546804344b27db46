"""Softmax over blocks of tokens: scores in base 2, masked, and their running maximum and sum.

Scores are `[rows, tokens]` where ROWS_FIRST, else `[tokens, rows]`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def of_rows(x, ROWS_FIRST: tl.constexpr):
    """A number for each row, beside numbers for the other side."""
    return x[:, None] if ROWS_FIRST else x[None, :]


@triton.jit
def of_others(x, ROWS_FIRST: tl.constexpr):
    """A number for each of what rows stand against: tokens, columns."""
    return x[None, :] if ROWS_FIRST else x[:, None]


@triton.jit
def masked(
    score,
    position,
    occupied,
    row,
    row_ok,
    b,
    masks,
    head_rows,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    ROWS_FIRST: tl.constexpr = False,
):
    """Scores with the mask by position; -inf where nothing may be attended. MASK: 0 none, 1 bool, 2 float."""
    keep = occupied
    if MASK > 0:
        column = tl.minimum(tl.maximum(position, 0), masks.columns - 1)
        start = masks.mask + b * masks.batch
        if MASK_ROWS:
            of_row = (row // head_rows) * masks.head + (row % head_rows) * masks.row
            at = start + of_others(column * masks.token, ROWS_FIRST) + of_rows(of_row, ROWS_FIRST)
            given = tl.load(at, mask=occupied & of_rows(row_ok, ROWS_FIRST), other=0)
        else:
            given = of_others(tl.load(start + column * masks.token), ROWS_FIRST)
        if MASK == 1:
            keep = keep & (given != 0)
        else:
            score += given.to(tl.float32) * LOG2E
    return tl.where(keep, score, float("-inf"))


@triton.jit
def softmax_step(score, top, total, ROWS_FIRST: tl.constexpr = False):
    """Weights of a block, the factor by which what was summed before fades, and the new maximum and sum."""
    axis: tl.constexpr = 1 if ROWS_FIRST else 0
    new_top = tl.maximum(top, tl.max(score, axis))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - of_rows(safe, ROWS_FIRST))
    fade = tl.exp2(top - safe)
    return weight, fade, new_top, total * fade + tl.sum(weight, axis)


@triton.jit
def log_sum_exp(top, total):
    """Log-sum-exp in base 2, and the inverse of the sum; -inf and 0 where nothing was attended."""
    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    return lse, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
