"""The text slots of layers that see only the newest tokens: a ring of whole blocks.

Text is stored in the order of its positions. When the last slot is taken, the oldest block is out of the window and is taken again:
its slots get the positions to come. A block is reused as a whole, because its keys were rotated back to its first slot.
"""

import numpy as np
from numpy.typing import NDArray

# Slots that are reused together where keys are not rotated back.
BLOCK = 32
# Of a window, at most this part is reused at once: the ring is longer than the window by as much.
BLOCK_SHARE = 1 / 8
LEAST_BLOCK = 16


def block_for(window: int, block: int = BLOCK) -> int:
    """Slots to reuse at once: `block`, halved while it is too large a part of the window."""
    while block // 2 >= LEAST_BLOCK and block > window * BLOCK_SHARE:
        block //= 2
    return block


def ring_slots(window: int, tail_slots: int, block: int) -> int:
    """Slots of a ring: whole blocks for the window's tokens that are not in the tail, and one more."""
    return (-(-max(window - tail_slots, 1) // block) + 1) * block


def whole_blocks(slots: int, block: int) -> int:
    """At least so many slots, in whole blocks."""
    return -(-slots // block) * block


def leading_blocks_dropped(positions: NDArray, block: int, keep_from: int, packed: int) -> NDArray[np.int64]:
    """Slots `[N']` of `[B, N]` positions without the leading blocks that hold none from `keep_from` to `packed`."""
    slots = np.arange(positions.shape[1])
    needed = np.flatnonzero(((positions >= keep_from) & (positions < packed)).any(0))
    first = int(needed[0]) // block * block if len(needed) else len(slots)
    return slots[first:]


def in_order(positions: NDArray, head: int, block: int, keep_from: int, packed: int) -> NDArray[np.int64]:
    """Slots `[N']` of a ring with positions `[B, N]`, oldest first, up to the last one taken; `head`: the slot taken next.

    Blocks without a position from `keep_from` on, and those given to tokens from `packed` on, are left out.
    """
    taken = whole_blocks(head, block)
    slots = np.arange(positions.shape[1])
    older, newer = slots[taken:], slots[:head]
    held = (positions < packed) & (positions >= keep_from)
    blocks = np.any(held[:, taken:], axis=0)
    padded = np.pad(blocks, (0, -len(blocks) % block)).reshape(-1, block).any(1)
    older = older[padded.repeat(block)[: len(older)]]
    # where the newest token is in the last block, blocks given away are the leading ones
    newest = leading_blocks_dropped(positions[:, :head], block, keep_from, packed) if len(older) == 0 else newer
    return np.concatenate([older, newest])
