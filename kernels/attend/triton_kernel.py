"""One launch over all segments."""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_dense import BY_INDEX, BY_RING, attend_dense
from apack_compile.kernels.attend.triton_packed import attend_packed
from apack_compile.kernels.triton_bands import first_component

# What a segment is.
ABSENT, PACKED_SEGMENT, DENSE_SEGMENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def attend_kernel(
    vision_share,
    text_share,
    tail_share,
    vision,
    text,
    first,
    tail,
    new,
    vision_rows,
    text_rows,
    results,
    masks,
    sizes,
    cursor,
    tiers,
    scale,
    VISION_KIND: tl.constexpr,
    TEXT_KIND: tl.constexpr,
    VISION_KEY: tl.constexpr,
    VISION_VALUE: tl.constexpr,
    TEXT_KEY: tl.constexpr,
    TEXT_VALUE: tl.constexpr,
    EVEN: tl.constexpr,
    PARTIAL: tl.constexpr,
    FIRST_PASS: tl.constexpr,
    VISION_TILES: tl.constexpr,
    TEXT_TILES: tl.constexpr,
    RESIDENT: tl.constexpr,
    KEEP_VISION: tl.constexpr,
    KEEP_TEXT: tl.constexpr,
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
    """Grid: programs of vision, of text, of the tail with the first and the new tokens; batch."""
    work = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    # fmt: off
    if work < vision_share.programs:
        if VISION_KIND == PACKED_SEGMENT:
            attend_packed(
                work, b, vision_share, vision, vision_rows, results.vision, results, masks, sizes, cursor, tiers,
                VISION_KEY, VISION_VALUE, EVEN[0], EVEN[1], PARTIAL, FIRST_PASS, VISION_TILES, KEEP_VISION, RESIDENT,
                MASK, MASK_ROWS, PACKED_DOT, BLOCK, GROUP_TILE,
            )
        elif VISION_KIND == DENSE_SEGMENT:
            attend_dense(
                work, b, vision_share, vision, first, new, vision_rows, results, masks, sizes, cursor, tiers, scale,
                BY_INDEX, KEEP_VISION, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, HEAD_TILE,
            )
    elif work < vision_share.programs + text_share.programs:
        if TEXT_KIND == PACKED_SEGMENT:
            attend_packed(
                work - vision_share.programs, b, text_share, text, text_rows, results.text, results, masks, sizes, cursor, None,
                TEXT_KEY, TEXT_VALUE, EVEN[2], EVEN[3], first_component(TEXT_VALUE, 4), FIRST_PASS, TEXT_TILES, KEEP_TEXT, RESIDENT,
                MASK, MASK_ROWS, PACKED_DOT, BLOCK, GROUP_TILE,
            )
        elif TEXT_KIND == DENSE_SEGMENT:
            attend_dense(
                work - vision_share.programs, b, text_share, text, first, new, text_rows, results, masks, sizes, cursor, None,
                scale, BY_INDEX, KEEP_TEXT, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, HEAD_TILE,
            )
    elif FIRST_PASS:
        attend_dense(
            work - vision_share.programs - text_share.programs, b, tail_share, tail, first, new, text_rows, results, masks, sizes,
            cursor, None, scale, BY_RING, False, CAUSAL, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DENSE_DOT, BLOCK, HEAD_TILE,
        )
    # fmt: on
