"""What the pass over the codes says of its tokens: their importance."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_slot", "slots", "all_slots"])
def importance_kernel(
    scores,
    row_lse,
    positions,
    importance,
    cursor,
    read,
    keep,
    add,
    first_slot,
    slots,
    all_slots,
    sizes,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Move the importance of the slots that were read towards the head-mean attention of the newest query, in place."""
    b = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    position = tl.load(positions + b * slots + slot, mask=inside, other=-1)
    was_read = (position >= 0) & (position < tl.minimum(tl.load(cursor + 1), tl.load(cursor) - sizes.new_tokens))
    if read is not None:
        was_read = was_read & (slot < tl.load(read + 2 * b + 1))
    summed = tl.zeros((BLOCK,), tl.float32)
    newest = sizes.all_rows // sizes.new_tokens
    for start in range(0, newest, ROWS):
        index = start + tl.arange(0, ROWS)
        # the newest token's rows: every new_tokens-th, counted from the last
        row = (index + 1) * sizes.new_tokens - 1
        lse = tl.load(row_lse + b * sizes.all_rows + row, mask=index < newest, other=float("inf"))
        at = scores + ((b * all_slots + first_slot + slot) * sizes.all_rows)[:, None] + row[None, :]
        score = tl.load(at, mask=was_read[:, None] & (index < newest)[None, :], other=float("-inf"))
        summed += tl.sum(tl.exp2(score - lse[None, :]), 1)
    known = tl.load(importance + b * slots + slot, mask=inside, other=0.0)
    tl.store(importance + b * slots + slot, keep * known + add * summed / newest, mask=was_read)
