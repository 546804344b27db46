"""Around the pass over the codes: queries into latents, splits into one, latents into outputs."""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_arguments import entry
from apack_compile.kernels.triton_bands import component_count
from apack_compile.kernels.triton_words import (
    COLUMN_BLOCK,
    SUM_ROWS,
    column_blocks,
    column_count,
    component_of,
    step_of,
)

# Where the float16 latents of a query row are put in their range: none can overflow, also where rows of a decoder are up to four times
# longer than theirs should be, and small ones keep their digits.
LATENT_BOUND = tl.constexpr(16384.0)


@triton.jit
def divided(start, more, by):
    """Quotient and remainder of `start + more`, int32; `more` and `by` are below 2^20, so that float32 numbers divide exactly.

    An integer division of a vector takes five times the instructions.
    """
    rest = start % by + more
    quotient = ((rest.to(tl.float32) + 0.5) * (1.0 / by)).to(tl.int32)
    return start // by + quotient, rest - quotient * by


@triton.jit
def folded_rows(row_tile, z, batch, kv_rows, FOLD: tl.constexpr, ROW_TILE: tl.constexpr):
    """A tile of a KV head's rows: batch index, row in the head, which exist. FOLD: rows of all sequences, else of sequence z."""
    start, more = row_tile * ROW_TILE, tl.arange(0, ROW_TILE)
    if FOLD:
        b, in_head = divided(start, more, kv_rows)
        b, row_ok = b.to(tl.int64), start + more < batch * kv_rows
    else:
        b, in_head, row_ok = tl.zeros((ROW_TILE,), tl.int64) + z, start + more, start + more < kv_rows
    return b, in_head, row_ok


@triton.constexpr_function
def part_width(head_dim, pairs, part):
    """Channels of the first or second half of the pairs that rotate, or of those that stay."""
    return pairs if part < 2 and pairs > 0 else head_dim - 2 * pairs


@triton.constexpr_function
def tile_width(head_dim, pairs, part):
    """Width of a tile of such channels."""
    return max(16, triton.next_power_of_2(pairs if part < 2 and pairs > 0 else head_dim - 2 * pairs))


@triton.jit
def load_channels(rows, stride, row_ok, start: tl.constexpr, WIDTH: tl.constexpr):
    """Channels `[rows, tile]` from `start` on, float32."""
    channel = tl.arange(0, tile_width(WIDTH, 0, 0))
    wanted = row_ok[:, None] & (channel < WIDTH)[None, :]
    return tl.load(rows[:, None] + ((start + channel) * stride)[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def project_segment(
    query,
    basis,
    out,
    rotations,
    next_rotations,
    anchors,
    first_block,
    sizes,
    batch,
    scale,
    LAYOUT: tl.constexpr,
    PAIRS: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of latent columns of a tile of rows: `q . decoder` times the step; the shift is `q . mean`. scale: in base 2.

    The levels' offset is taken times the latents as they are stored: the scores have it off them exactly. Latents in float16 come of
    float16 products: their rounding is that of the latents.

    Where PAIRS rotate, each row stands there once per anchor, rotated back by it.
    """
    head = tl.program_id(1) % sizes.kv_heads
    z = (tl.program_id(1) // sizes.kv_heads).to(tl.int64)
    per_group = sizes.kv_heads // sizes.groups
    if PAIRS > 0:
        start, more = tl.program_id(0) * ROW_TILE, tl.arange(0, ROW_TILE)
        every_row, anchor = divided(start, more, anchors)
        if FOLD:
            first = start // anchors
            b, in_head = divided(first, every_row - first, sizes.kv_rows)
            b, row_ok = b.to(tl.int64), start + more < batch * sizes.kv_rows * anchors
        else:
            b, in_head, row_ok = tl.zeros((ROW_TILE,), tl.int64) + z, every_row, start + more < sizes.kv_rows * anchors
        row = head * sizes.kv_rows + in_head
        copy = b * anchors + anchor
    else:
        b, in_head, row_ok = folded_rows(tl.program_id(0), z, batch, sizes.kv_rows, FOLD, ROW_TILE)
        row = head * sizes.kv_rows + in_head
        copy = b
    at_row = copy * sizes.all_rows + row
    rank: tl.constexpr = component_count(LAYOUT)
    all_columns: tl.constexpr = column_count(LAYOUT)
    dtype: tl.constexpr = out.latent.dtype.element_ty
    group = z * basis.next_batch + head // per_group
    width = per_group * HEAD_DIM
    of_head = (head % per_group) * HEAD_DIM
    query_head, in_query_head = divided(0, row, sizes.head_rows)
    start_of = query.pointer + b * query.batch + query_head * query.head + in_query_head * query.row
    # the halves of the pairs that rotate, and the channels that stay
    tiles = ()
    if PAIRS > 0:
        first = load_channels(start_of, query.channel, row_ok, 0, PAIRS)
        second = load_channels(start_of, query.channel, row_ok, PAIRS, PAIRS)
        turn = rotations + (b * next_rotations * anchors + anchor) * 2 * PAIRS
        cosine, sine = load_channels(turn, 1, row_ok, 0, PAIRS), load_channels(turn, 1, row_ok, PAIRS, PAIRS)
        tiles = tiles + (first * cosine + second * sine, second * cosine - first * sine)
    if 2 * PAIRS < HEAD_DIM:
        tiles = tiles + (load_channels(start_of, query.channel, row_ok, 2 * PAIRS, HEAD_DIM - 2 * PAIRS),)
    shift = tl.zeros((ROW_TILE,), tl.float32)
    top = tl.zeros((ROW_TILE,), tl.float32)
    for i in tl.static_range(len(tiles)):
        channel = tl.arange(0, tile_width(HEAD_DIM, PAIRS, i))
        at_mean = basis.mean + group * width + of_head + i * PAIRS + channel
        mean = tl.load(at_mean, mask=channel < part_width(HEAD_DIM, PAIRS, i), other=0.0).to(tl.float32)
        shift += tl.sum(tiles[i] * mean[None, :], 1)
        top = tl.maximum(top, tl.max(tl.abs(tiles[i]), 1))
    # decoder rows have unit length, so this bounds every product of the row; a power of two: no digit is lost
    in_range = tl.exp2(
        tl.minimum(tl.floor(tl.log2(LATENT_BOUND / HEAD_DIM**0.5) - tl.log2(tl.where(top > 0.0, top, 1.0))), 126.0)
    )
    rounded = ()
    for i in tl.static_range(len(tiles)):
        rounded = rounded + (tl.trans((tiles[i] * in_range[:, None]).to(dtype)),)
    step_block: tl.constexpr = max(16, triton.next_power_of_2(min(rank, 1024)))
    largest = tl.zeros((step_block,), tl.float32)
    for start in range(0, rank, step_block):
        index = start + tl.arange(0, step_block)
        largest = tl.maximum(largest, tl.load(basis.step + group * rank + index, mask=index < rank, other=0.0))
    largest_step = tl.max(largest, 0)
    largest_step = tl.where(largest_step > 0.0, largest_step, 1.0)
    if first_block == 0:
        tl.store(out.shift + at_row, shift * scale, mask=row_ok)
        tl.store(out.scale + at_row, scale * largest_step / in_range, mask=row_ok)
    for block in range(first_block, tl.minimum(first_block + BLOCKS, column_blocks(LAYOUT))):
        column = block * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
        component = component_of(column, LAYOUT)
        known = component >= 0
        # columns along the side of which a warp has few: what is known of each is computed as often as it is held
        at_component = basis.decoder + (group * rank + component) * width + of_head
        latent = tl.zeros((COLUMN_BLOCK, ROW_TILE), tl.float32)
        for i in tl.static_range(len(tiles)):
            channel = tl.arange(0, tile_width(HEAD_DIM, PAIRS, i))
            real = known[:, None] & (channel < part_width(HEAD_DIM, PAIRS, i))[None, :]
            at = at_component[:, None] + (i * PAIRS + channel)[None, :]
            decoder = tl.load(at, mask=real, other=0.0).to(dtype)
            latent = tl.dot(decoder, rounded[i], latent, input_precision="ieee")
        step = tl.load(basis.step + group * rank + component, mask=known, other=0.0)
        divisor, level_offset = step_of(column, LAYOUT, dtype)
        stored = (latent * (step / (divisor * largest_step))[:, None]).to(dtype)
        at = out.latent + (at_row * all_columns)[None, :] + column[:, None]
        tl.store(at, stored, mask=row_ok[None, :] & (column < all_columns)[:, None])
        if out.offset is not None:
            # by the matrix unit: all rows of the product are the same
            above = tl.zeros((SUM_ROWS, COLUMN_BLOCK), tl.float32) + (level_offset * divisor)[None, :]
            offset = tl.max(tl.dot(above.to(dtype), stored), 0)
            tl.store(out.offset + (copy * column_blocks(LAYOUT) + block) * sizes.all_rows + row, offset, mask=row_ok)


@triton.constexpr_function
def block_tiles(layout, blocks):
    """Programs that take so many blocks of a layout's latent columns each."""
    return -(-column_blocks(layout) // blocks)


@triton.jit(do_not_specialize=[f"anchors_{i}" for i in range(5)])
def project_kernel(
    query,
    segments,
    anchors_0,
    anchors_1,
    anchors_2,
    anchors_3,
    anchors_4,
    sizes,
    batch,
    scale,
    LAYOUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Query latents of the packed segments. Grid: tiles of rows, times the anchors of the segment that has most; KV heads (of each
    sequence); BLOCKS blocks of columns of each segment.
    """
    tile = tl.program_id(2)
    first_row = tl.program_id(0) * ROW_TILE
    rows = sizes.kv_rows * batch if FOLD else sizes.kv_rows
    anchors = anchors_0, anchors_1, anchors_2, anchors_3, anchors_4
    for i in tl.static_range(len(LAYOUTS)):
        if tile < block_tiles(entry(LAYOUTS, i), BLOCKS):
            if first_row < rows * anchors[i]:
                # fmt: off
                project_segment(
                    query, segments[i].basis, segments[i].latent, segments[i].rotations, segments[i].next_batch, anchors[i],
                    tile * BLOCKS, sizes, batch, scale, entry(LAYOUTS, i), PAIRS[i], FOLD, HEAD_DIM, ROW_TILE, BLOCKS,
                )
                # fmt: on
            return
        tile -= block_tiles(entry(LAYOUTS, i), BLOCKS)


@triton.jit
def merge_segment(
    lse, segment, first, splits, b, row, block, all_splits, all_rows, top, inverse, COLUMNS: tl.constexpr
):
    """A block of a row's output over one segment: its splits, each by its share of the softmax."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    real_column = column < segment.columns
    summed = tl.zeros((COLUMNS,), tl.float32)
    shares = tl.zeros((16,), tl.float32)
    for start in range(0, splits, 16):
        split = start + tl.arange(0, 16)
        real = split < splits
        at_lse = lse + (b * all_splits + first + split) * all_rows + row
        share = tl.exp2(tl.load(at_lse, mask=real, other=float("-inf")) - top) * inverse
        at_part = ((b * splits + split) * all_rows + row) * segment.columns
        at = segment.part + at_part[:, None] + column[None, :]
        given = tl.load(at, mask=real[:, None] & real_column[None, :], other=0.0)
        summed += tl.sum(given * share[:, None], 0)
        shares += share
    at_row = b * all_rows + row
    at_out = segment.out.latent + at_row * segment.columns + column
    tl.store(at_out, summed.to(segment.out.latent.dtype.element_ty), mask=real_column)
    if segment.out.scale is not None:
        if block == 0:
            tl.store(segment.out.scale + at_row, tl.sum(shares, 0))


@triton.jit(do_not_specialize=[f"splits_{i}" for i in range(6)])
def merge_kernel(
    splits_0,
    splits_1,
    splits_2,
    splits_3,
    splits_4,
    splits_5,
    lse,
    segments,
    row_lse,
    all_rows,
    SEGMENTS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the splits of the dense tokens, and of each packed segment; log-sum-exps lie in this order.

    Grid: rows; batch; blocks of columns in this order. SEGMENTS: how many there are. SPLITS: all, padded.
    """
    row = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    split = tl.arange(0, SPLITS)
    splits = splits_0, splits_1, splits_2, splits_3, splits_4, splits_5
    all_splits = splits_0 + splits_1 + splits_2 + splits_3 + splits_4 + splits_5
    at_lse = lse + (b * all_splits + split) * all_rows + row
    own = tl.load(at_lse, mask=split < all_splits, other=float("-inf"))
    top = tl.max(own, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(own - top), 0)
    inverse = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    if row_lse is not None:
        # where nothing was attended, +inf makes every weight 0
        whole = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
        if block == 0:
            tl.store(row_lse + b * all_rows + row, whole)
    first = 0
    for i in tl.static_range(SEGMENTS):
        if block < segments[i].blocks:
            merge_segment(
                lse, segments[i], first, splits[i], b, row, block, all_splits, all_rows, top, inverse, COLUMNS
            )
            return
        block -= segments[i].blocks
        first += splits[i]


@triton.jit
def expand_segment(
    summed,
    segment,
    b,
    z,
    row,
    row_ok,
    head,
    channel,
    sizes,
    LAYOUT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`summed` plus a segment's output: latents times step and decoder, and its share of the softmax times the mean."""
    latent, basis = segment.latent, segment.basis
    per_group = sizes.kv_heads // sizes.groups
    rank: tl.constexpr = component_count(LAYOUT)
    all_columns: tl.constexpr = column_count(LAYOUT)
    group = z * basis.next_batch + head // per_group
    width = per_group * VALUE_DIM
    of_head = (head % per_group) * VALUE_DIM
    real = channel < VALUE_DIM
    at_row = b * sizes.all_rows + row
    share = tl.load(latent.scale + at_row, mask=row_ok, other=0.0)
    mean = tl.load(basis.mean + group * width + of_head + channel, mask=real, other=0.0).to(tl.float32)
    summed += share[:, None] * mean[None, :]
    for start in range(0, all_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        component = component_of(column, LAYOUT)
        known = component >= 0
        at = latent.latent + (at_row * all_columns)[:, None] + column[None, :]
        own = tl.load(at, mask=row_ok[:, None] & known[None, :], other=0.0)
        step = tl.load(basis.step + group * rank + component, mask=known, other=0.0)
        at_component = (group * rank + component) * width + of_head
        at = basis.decoder + at_component[:, None] + channel[None, :]
        decoder = tl.load(at, mask=known[:, None] & real[None, :], other=0.0).to(tl.float32)
        summed = tl.dot(own * step[None, :], decoder, summed, input_precision=PRECISION)
    return summed


@triton.jit
def expand_kernel(
    dense,
    segments,
    out,
    sizes,
    batch,
    LAYOUTS: tl.constexpr,
    FOLD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Outputs `[B, rows, D]`: dense ones plus those of the packed segments. Grid: row tiles; KV heads (of each sequence); channels."""
    head = tl.program_id(1) % sizes.kv_heads
    z = (tl.program_id(1) // sizes.kv_heads).to(tl.int64)
    b, in_head, row_ok = folded_rows(tl.program_id(0), z, batch, sizes.kv_rows, FOLD, ROW_TILE)
    row = head * sizes.kv_rows + in_head
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    at = ((b * sizes.all_rows + row) * VALUE_DIM)[:, None] + channel[None, :]
    both = row_ok[:, None] & (channel < VALUE_DIM)[None, :]
    summed = tl.load(dense + at, mask=both, other=0.0)
    for i in tl.static_range(len(LAYOUTS)):
        summed = expand_segment(
            summed,
            segments[i],
            b,
            z,
            row,
            row_ok,
            head,
            channel,
            sizes,
            entry(LAYOUTS, i),
            VALUE_DIM,
            PRECISION,
            COLUMNS,
        )
    tl.store(out + at, summed.to(out.dtype.element_ty), mask=both)
