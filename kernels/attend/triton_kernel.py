"""One launch over all segments."""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_arguments import Share
from apack_compile.kernels.attend.triton_dense import BY_INDEX, BY_RING, attend_dense
from apack_compile.kernels.attend.triton_packed import attend_packed
from apack_compile.kernels.triton_bands import component_count

# What a segment is.
ABSENT, PACKED_SEGMENT, DENSE_SEGMENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(
    do_not_specialize=[
        "coarse_splits",
        "vision_splits",
        "text_splits",
        "tail_splits",
        "coarse_slots",
        "vision_slots",
        "text_slots",
        "tail_slots",
        "blocks",
        "coarse_anchors",
        "vision_anchors",
        "text_anchors",
    ]
)
def attend_kernel(
    coarse_splits,
    vision_splits,
    text_splits,
    tail_splits,
    coarse_slots,
    vision_slots,
    text_slots,
    tail_slots,
    blocks,
    coarse_anchors,
    vision_anchors,
    text_anchors,
    coarse,
    vision,
    text,
    first,
    tail,
    new,
    coarse_rows,
    vision_rows,
    text_rows,
    results,
    masks,
    sizes,
    cursor,
    tiers,
    scale,
    COARSE_KIND: tl.constexpr,
    VISION_KIND: tl.constexpr,
    TEXT_KIND: tl.constexpr,
    COARSE_KEY: tl.constexpr,
    COARSE_VALUE: tl.constexpr,
    VISION_KEY: tl.constexpr,
    VISION_VALUE: tl.constexpr,
    TEXT_KEY: tl.constexpr,
    TEXT_VALUE: tl.constexpr,
    EVEN: tl.constexpr,
    PARTIAL: tl.constexpr,
    FIRST_PASS: tl.constexpr,
    RUNS: tl.constexpr,
    COARSE_TILES: tl.constexpr,
    VISION_TILES: tl.constexpr,
    TEXT_TILES: tl.constexpr,
    RESIDENT: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr,
    KEEP_COARSE: tl.constexpr,
    KEEP_VISION: tl.constexpr,
    KEEP_TEXT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    PACKED_DOT: tl.constexpr,
    DENSE_DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
):
    """Grid: programs of coarse, of vision, of text, and in the FIRST_PASS of the tail with the first and the new tokens; batch.

    A later pass RUNS only what has value tiles in it.
    """
    work = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    group_tiles, head_tiles = tl.cdiv(sizes.group_rows, GROUP_TILE), tl.cdiv(sizes.kv_rows, HEAD_TILE)
    coarse_tiles, coarse_units, coarse_part = group_tiles, sizes.groups, 0
    vision_tiles, vision_units, vision_part = group_tiles, sizes.groups, 0
    text_tiles, text_units, text_part = group_tiles, sizes.groups, 0
    # outputs over dense tokens lie in one tensor: the tail's, then those of the others in order; so do log-sum-exps, the packed ones
    # after them
    dense_splits = tail_splits
    if COARSE_KIND == DENSE_SEGMENT:
        coarse_tiles, coarse_units, coarse_part = head_tiles, sizes.kv_heads, dense_splits
        dense_splits += coarse_splits
    if VISION_KIND == DENSE_SEGMENT:
        vision_tiles, vision_units, vision_part = head_tiles, sizes.kv_heads, dense_splits
        dense_splits += vision_splits
    if TEXT_KIND == DENSE_SEGMENT:
        text_tiles, text_units, text_part = head_tiles, sizes.kv_heads, dense_splits
        dense_splits += text_splits
    splits = tail_splits + coarse_splits + vision_splits + text_splits
    coarse_first, coarse_parts = coarse_part, dense_splits
    vision_first, vision_parts, text_first, text_parts = vision_part, dense_splits, text_part, dense_splits
    coarse_end = dense_splits
    if COARSE_KIND == PACKED_SEGMENT:
        coarse_first, coarse_parts = dense_splits, coarse_splits
        coarse_end += coarse_splits
    if VISION_KIND == PACKED_SEGMENT:
        vision_first, vision_parts = coarse_end, vision_splits
    if TEXT_KIND == PACKED_SEGMENT:
        text_first, text_parts = splits - text_splits, text_splits
    kept_coarse = coarse_slots if KEEP_COARSE else 0
    before_text = kept_coarse + (vision_slots if KEEP_VISION else 0)
    kept = before_text + (text_slots if KEEP_TEXT else 0)
    # fmt: off
    coarse_share = Share(
        coarse_splits, coarse_tiles, blocks, coarse_slots, coarse_first, splits, coarse_part, coarse_parts, 0, kept,
        coarse_anchors,
    )
    vision_share = Share(
        vision_splits, vision_tiles, blocks, vision_slots, vision_first, splits, vision_part, vision_parts, kept_coarse, kept,
        vision_anchors,
    )
    text_share = Share(
        text_splits, text_tiles, blocks, text_slots, text_first, splits, text_part, text_parts, before_text, kept,
        text_anchors,
    )
    tail_share = Share(tail_splits, head_tiles, blocks, tail_slots, 0, splits, 0, dense_splits, 0, kept, 0)
    coarse_programs = coarse_splits * coarse_tiles * coarse_units if RUNS[0] else 0
    vision_programs = vision_splits * vision_tiles * vision_units if RUNS[1] else 0
    text_programs = text_splits * text_tiles * text_units if RUNS[2] else 0
    vision_end = coarse_programs + vision_programs
    if work < coarse_programs:
        if COARSE_KIND == PACKED_SEGMENT:
            attend_packed(
                work, b, coarse_share, coarse, coarse_rows, results.coarse, results, masks, sizes, cursor, None,
                COARSE_KEY, COARSE_VALUE, EVEN[0], EVEN[1], component_count(COARSE_VALUE), FIRST_PASS, COARSE_TILES, KEEP_COARSE,
                RESIDENT, ANCHOR_SLOTS[0], MASK, MASK_ROWS, PACKED_DOT, BLOCK, GROUP_TILE,
            )
        elif COARSE_KIND == DENSE_SEGMENT:
            attend_dense(
                work, b, coarse_share, coarse, first, new, coarse_rows, results, masks, sizes, cursor, None, scale,
                BY_INDEX, KEEP_COARSE, ALIGNED, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, HEAD_TILE,
            )
    elif work < vision_end:
        if VISION_KIND == PACKED_SEGMENT:
            attend_packed(
                work - coarse_programs, b, vision_share, vision, vision_rows, results.vision, results, masks, sizes, cursor, tiers,
                VISION_KEY, VISION_VALUE, EVEN[2], EVEN[3], PARTIAL, FIRST_PASS, VISION_TILES, KEEP_VISION, RESIDENT,
                ANCHOR_SLOTS[1], MASK, MASK_ROWS, PACKED_DOT, BLOCK, GROUP_TILE,
            )
        elif VISION_KIND == DENSE_SEGMENT:
            attend_dense(
                work - coarse_programs, b, vision_share, vision, first, new, vision_rows, results, masks, sizes, cursor, tiers,
                scale, BY_INDEX, KEEP_VISION, ALIGNED, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, HEAD_TILE,
            )
    elif work < vision_end + text_programs:
        if TEXT_KIND == PACKED_SEGMENT:
            attend_packed(
                work - vision_end, b, text_share, text, text_rows, results.text, results, masks, sizes, cursor, None,
                TEXT_KEY, TEXT_VALUE, EVEN[4], EVEN[5], component_count(TEXT_VALUE), FIRST_PASS, TEXT_TILES, KEEP_TEXT, RESIDENT,
                ANCHOR_SLOTS[2], MASK, MASK_ROWS, PACKED_DOT, BLOCK, GROUP_TILE,
            )
        elif TEXT_KIND == DENSE_SEGMENT:
            attend_dense(
                work - vision_end, b, text_share, text, first, new, text_rows, results, masks, sizes, cursor, None,
                scale, BY_INDEX, KEEP_TEXT, ALIGNED, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, HEAD_TILE,
            )
    elif FIRST_PASS:
        attend_dense(
            work - vision_end - text_programs, b, tail_share, tail, first, new, text_rows, results, masks, sizes,
            cursor, None, scale, BY_RING, False, ALIGNED, CAUSAL, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, HEAD_TILE,
        )
    # fmt: on
