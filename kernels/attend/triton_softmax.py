"""Softmax over blocks of tokens: transposed scores `[tokens, rows]` in base 2, masked, and their running maximum and sum."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def masked(score, position, occupied, row, row_ok, b, masks, head_rows, MASK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Scores with the mask by position; -inf where nothing may be attended. MASK: 0 none, 1 bool, 2 float."""
    keep = occupied
    if MASK > 0:
        column = tl.minimum(tl.maximum(position, 0), masks.columns - 1)
        start = masks.mask + b * masks.batch
        if MASK_ROWS:
            of_row = (row // head_rows) * masks.head + (row % head_rows) * masks.row
            at = start + (column * masks.token)[:, None] + of_row[None, :]
            given = tl.load(at, mask=occupied & row_ok[None, :], other=0)
        else:
            given = tl.load(start + column * masks.token)[:, None]
        if MASK == 1:
            keep = keep & (given != 0)
        else:
            score += given.to(tl.float32) * LOG2E
    return tl.where(keep, score, float("-inf"))


@triton.jit
def softmax_step(score, top, total):
    """Weights of a block, the factor by which what was summed before fades, and the new maximum and sum."""
    new_top = tl.maximum(top, tl.max(score, 0))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - safe[None, :])
    fade = tl.exp2(top - safe)
    return weight, fade, new_top, total * fade + tl.sum(weight, 0)


@triton.jit
def log_sum_exp(top, total):
    """Log-sum-exp in base 2, and the inverse of the sum; -inf and 0 where nothing was attended."""
    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    return lse, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
