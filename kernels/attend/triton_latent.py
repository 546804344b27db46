"""Around the pass over the codes: queries into latents, splits into one, latents into outputs, importance."""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_arguments import entry
from apack_compile.kernels.triton_bands import (
    COLUMN_BLOCK,
    FLOAT16_MAX,
    column_blocks,
    column_count,
    component_count,
    component_of,
    offset_of,
)
from apack_compile.kernels.triton_rotations import partner_of, rotated_back

# Where the float16 latents of a query row are put in their range: none can overflow, and small ones keep their digits.
LATENT_BOUND = tl.constexpr(16384.0)


@triton.jit
def folded_rows(row_tile, z, batch, kv_rows, FOLD: tl.constexpr, ROW_TILE: tl.constexpr):
    """A tile of a KV head's rows: batch index, row in the head, which exist. FOLD: rows of all sequences, else of sequence z."""
    index = row_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    if FOLD:
        b, in_head, row_ok = (index // kv_rows).to(tl.int64), index % kv_rows, index < batch * kv_rows
    else:
        b, in_head, row_ok = tl.zeros((ROW_TILE,), tl.int64) + z, index, index < kv_rows
    return b, in_head, row_ok


@triton.jit
def project_segment(
    query,
    basis,
    out,
    rotations,
    anchors,
    block,
    sizes,
    batch,
    scale,
    LAYOUT: tl.constexpr,
    PAIRS: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A block of latent columns of a tile of rows: `q . decoder` times the step; the shift is `q . mean`. scale: in base 2.

    The levels' offset is taken times the latents as they are stored: the scores have it off them exactly.

    Where PAIRS rotate, each row stands there once per anchor, rotated back by it.
    """
    head = tl.program_id(1) % sizes.kv_heads
    z = (tl.program_id(1) // sizes.kv_heads).to(tl.int64)
    per_group = sizes.kv_heads // sizes.groups
    if PAIRS > 0:
        b, rotated_row, row_ok = folded_rows(tl.program_id(0), z, batch, sizes.kv_rows * anchors, FOLD, ROW_TILE)
        row = head * sizes.kv_rows + rotated_row // anchors
        anchor = rotated_row % anchors
        copy = b * anchors + anchor
    else:
        b, in_head, row_ok = folded_rows(tl.program_id(0), z, batch, sizes.kv_rows, FOLD, ROW_TILE)
        row = head * sizes.kv_rows + in_head
        copy = b
    at_row = copy * sizes.all_rows + row
    column = block * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    component = component_of(column, LAYOUT)
    known = component >= 0
    rank: tl.constexpr = component_count(LAYOUT)
    group = z * basis.next_batch + head // per_group
    width = per_group * HEAD_DIM
    of_head = (head % per_group) * HEAD_DIM
    of_row = (row // sizes.head_rows) * query.head + (row % sizes.head_rows) * query.row
    start_of = query.pointer + b * query.batch + of_row
    latent = tl.zeros((ROW_TILE, COLUMN_BLOCK), tl.float32)
    top = tl.zeros((ROW_TILE,), tl.float32)
    shift = tl.zeros((ROW_TILE,), tl.float32)
    for start in tl.static_range(0, HEAD_DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        real = channel < HEAD_DIM
        at_query = start_of[:, None] + (channel * query.channel)[None, :]
        q = tl.load(at_query, mask=row_ok[:, None] & real[None, :], other=0.0).to(tl.float32)
        if PAIRS > 0:
            at_partner = start_of[:, None] + (partner_of(channel, PAIRS) * query.channel)[None, :]
            partner = tl.load(at_partner, mask=row_ok[:, None] & real[None, :], other=0.0).to(tl.float32)
            q = rotated_back(q, partner, rotations, (b * anchors + anchor) * 2 * PAIRS, row_ok, channel, PAIRS)
        at_component = (group * rank + component) * width + of_head
        at_decoder = basis.decoder + at_component[None, :] + channel[:, None]
        decoder = tl.load(at_decoder, mask=known[None, :] & real[:, None], other=0.0).to(tl.float32)
        latent = tl.dot(q, decoder, latent, input_precision=PRECISION)
        top = tl.maximum(top, tl.max(tl.abs(q), 1))
        mean = tl.load(basis.mean + group * width + of_head + channel, mask=real, other=0.0).to(tl.float32)
        shift += tl.sum(q * mean[None, :], 1)
    largest = tl.zeros((1024,), tl.float32)
    for start in range(0, rank, 1024):
        index = start + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.load(basis.step + group * rank + index, mask=index < rank, other=0.0))
    # decoder rows have unit length, so this bounds every component of the row
    bound = top * HEAD_DIM**0.5 * tl.max(largest, 0)
    ratio = tl.where(bound > 0.0, LATENT_BOUND / tl.where(bound > 0.0, bound, 1.0), 1.0)
    step = tl.load(basis.step + group * rank + component, mask=known, other=0.0)
    latent = latent * step[None, :] * ratio[:, None]
    latent = tl.minimum(tl.maximum(latent, -FLOAT16_MAX), FLOAT16_MAX)
    all_columns: tl.constexpr = column_count(LAYOUT)
    at = out.latent + (at_row * all_columns)[:, None] + column[None, :]
    stored = latent.to(out.latent.dtype.element_ty)
    tl.store(at, stored, mask=row_ok[:, None] & (column < all_columns)[None, :])
    if out.offset is not None:
        offset = tl.sum(stored.to(tl.float32) * offset_of(column, LAYOUT, stored.dtype)[None, :], 1)
        tl.store(out.offset + (copy * column_blocks(LAYOUT) + block) * sizes.all_rows + row, offset, mask=row_ok)
    if block == 0:
        tl.store(out.scale + at_row, scale / ratio, mask=row_ok)
        tl.store(out.shift + at_row, shift * scale, mask=row_ok)


@triton.jit(do_not_specialize=["anchors_0", "anchors_1", "anchors_2"])
def project_kernel(
    query,
    segments,
    anchors_0,
    anchors_1,
    anchors_2,
    sizes,
    batch,
    scale,
    LAYOUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Query latents of the packed segments. Grid: tiles of rows, times the anchors of the segment that has most; KV heads (of each
    sequence); blocks of columns of each segment.
    """
    block = tl.program_id(2)
    first_row = tl.program_id(0) * ROW_TILE
    rows = sizes.kv_rows * batch if FOLD else sizes.kv_rows
    anchors = anchors_0, anchors_1, anchors_2
    for i in tl.static_range(len(LAYOUTS)):
        if block < column_blocks(entry(LAYOUTS, i)):
            if first_row < rows * anchors[i]:
                # fmt: off
                project_segment(
                    query, segments[i].basis, segments[i].latent, segments[i].rotations, anchors[i], block, sizes, batch, scale,
                    entry(LAYOUTS, i), PAIRS[i], FOLD, HEAD_DIM, PRECISION, ROW_TILE, CHANNELS,
                )
                # fmt: on
            return
        block -= column_blocks(entry(LAYOUTS, i))


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


@triton.jit(do_not_specialize=["splits_0", "splits_1", "splits_2", "splits_3"])
def merge_kernel(
    splits_0,
    splits_1,
    splits_2,
    splits_3,
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
    splits = splits_0, splits_1, splits_2, splits_3
    all_splits = splits_0 + splits_1 + splits_2 + splits_3
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
