"""One launch over all segments."""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_arguments import Share, entry
from apack_compile.kernels.attend.triton_dense import BY_INDEX, BY_RING, attend_dense
from apack_compile.kernels.attend.triton_packed import attend_packed
from apack_compile.kernels.state import MAX_SEGMENTS

# What grows with the cache is an argument for each packed segment: Triton compiles another kernel for other numbers in a tuple.
GROWS = [f"{name}_{i}" for name in ("splits", "slots", "anchors") for i in range(MAX_SEGMENTS)]


@triton.jit(do_not_specialize=[*GROWS, "tail_splits", "tail_slots", "blocks"])
def attend_kernel(
    splits_0,
    splits_1,
    splits_2,
    splits_3,
    splits_4,
    slots_0,
    slots_1,
    slots_2,
    slots_3,
    slots_4,
    anchors_0,
    anchors_1,
    anchors_2,
    anchors_3,
    anchors_4,
    tail_splits,
    tail_slots,
    blocks,
    segments,
    first,
    tail,
    new,
    rows,
    results,
    masks,
    sizes,
    cursor,
    scale,
    PACKED: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PARTIAL: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr,
    KEEPS: tl.constexpr,
    RUNS: tl.constexpr,
    TILES: tl.constexpr,
    FIRST_PASS: tl.constexpr,
    RESIDENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PACKED_DOT: tl.constexpr,
    DENSE_DOT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK: tl.constexpr,
    DENSE_BLOCK: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """Grid: programs of each of the segments, and in the FIRST_PASS of the tail with the first and the new tokens; batch.

    Constants from PACKED to TILES are tuples, by segment. PACKED: whether it is, or tokens are kept as they are. A later pass RUNS only
    what has value tiles in it.
    """
    work = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    splits, slots, anchors = (
        (splits_0, splits_1, splits_2, splits_3, splits_4),
        (slots_0, slots_1, slots_2, slots_3, slots_4),
        (anchors_0, anchors_1, anchors_2, anchors_3, anchors_4),
    )
    group_tiles, head_tiles = tl.cdiv(sizes.group_rows, GROUP_TILE), tl.cdiv(sizes.kv_rows, HEAD_TILE)
    # outputs over dense tokens lie in one tensor: the tail's, then those of the others in order; so do log-sum-exps, the packed ones
    # after them
    dense_splits, all_splits, all_slots = tail_splits, tail_splits, 0
    for i in tl.static_range(len(PACKED)):
        all_splits += splits[i]
        if not PACKED[i]:
            dense_splits += splits[i]
        if KEEPS[i]:
            all_slots += slots[i]
    programs, dense_before, packed_before, slots_before = 0, tail_splits, dense_splits, 0
    # fmt: off
    for i in tl.static_range(len(PACKED)):
        begin = programs
        if RUNS[i]:
            programs += splits[i] * (group_tiles * sizes.groups if PACKED[i] else head_tiles * sizes.kv_heads)
            if work < programs:
                if PACKED[i]:
                    share = Share(
                        splits[i], group_tiles, blocks, slots[i], packed_before, all_splits, 0, splits[i], slots_before, all_slots,
                        anchors[i],
                    )
                    attend_packed(
                        work - begin, b, share, segments[i], results, masks, sizes, cursor,
                        entry(KEY, i), entry(VALUE, i), PARTIAL[i], FIRST_PASS, entry(TILES, i), KEEPS[i], RESIDENT,
                        ANCHOR_SLOTS[i], MASK, MASK_ROWS, PACKED_DOT, ASSEMBLY, BLOCK, GROUP_TILE, ROWS_FIRST,
                    )
                else:
                    share = Share(
                        splits[i], head_tiles, blocks, slots[i], dense_before, all_splits, dense_before, dense_splits, slots_before,
                        all_slots, 0,
                    )
                    attend_dense(
                        work - begin, b, share, segments[i], first, new, rows, results, masks, sizes, cursor, scale,
                        BY_INDEX, KEEPS[i], ALIGNED, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, DENSE_BLOCK,
                        DENSE_STAGES, HEAD_TILE,
                    )
                return
        if PACKED[i]:
            packed_before += splits[i]
        else:
            dense_before += splits[i]
        if KEEPS[i]:
            slots_before += slots[i]
    if FIRST_PASS:
        share = Share(tail_splits, head_tiles, blocks, tail_slots, 0, all_splits, 0, dense_splits, 0, all_slots, 0)
        attend_dense(
            work - programs, b, share, tail, first, new, rows, results, masks, sizes, cursor, scale,
            BY_RING, False, ALIGNED, CAUSAL, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, DENSE_BLOCK, DENSE_STAGES, HEAD_TILE,
        )
    # fmt: on
