"""The pass over dense tokens: scores, softmax and outputs of one split of a segment, for all rows of a KV head."""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_softmax import log_sum_exp, masked, softmax_step

# How a slot gets its position: from `positions`, from the tail's ring, or because it is one of the new tokens.
BY_INDEX, BY_RING, BY_ORDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.constexpr_function
def channel_tile(channels):
    """Width of the tiles of so many channels: the smallest that holds them, or 128 or 64, whichever pads less."""
    for width in (16, 32, 64):
        if channels <= width:
            return width
    return 128 if -(-channels // 128) * 2 <= -(-channels // 64) else 64


@triton.constexpr_function
def channel_tiles(channels):
    """Tiles of so many channels."""
    return -(-channels // channel_tile(channels))


@triton.jit
def aligned(stride, ALIGNED: tl.constexpr):
    """A stride that is a multiple of ALIGNED, so that the compiler sees it."""
    return (stride // ALIGNED) * ALIGNED


@triton.jit
def start_of_head(x, b, head, ALIGNED: tl.constexpr):
    """Offset of a head's first token."""
    of_group = (head // x.per) * aligned(x.group, ALIGNED) + (head % x.per) * aligned(x.head, ALIGNED)
    return b * aligned(x.batch, ALIGNED) + of_group


@triton.jit
def dense_range(
    top,
    total,
    accumulated,
    query,
    start_at,
    end,
    b,
    head,
    segment,
    slots,
    share,
    row,
    row_ok,
    results,
    masks,
    sizes,
    scale,
    held,
    packed,
    KIND: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Online softmax over the slots from `start_at` to `end` of a dense segment; the updated maximum, sum and output tiles."""
    key, value = segment.key, segment.value
    first_key = key.pointer + start_of_head(key, b, head, ALIGNED)
    first_value = value.pointer + start_of_head(value, b, head, ALIGNED)
    before = held - sizes.new_tokens
    for start in tl.range(start_at, end, BLOCK, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < end
        if KIND == BY_INDEX:
            position = tl.load(segment.positions + b * segment.next_batch * slots + slot, mask=inside, other=-1)
            occupied = (position >= 0) & (position < tl.minimum(packed, before))
        elif KIND == BY_RING:
            # the remainder is taken of a number >= 0, where compiled code and Python agree
            position = packed + (slot - packed % slots + slots) % slots
            occupied = inside & (position < before)
        else:
            position = before + slot
            occupied = inside
        score = tl.zeros((BLOCK, ROW_TILE), tl.float32)
        for number in tl.static_range(channel_tiles(HEAD_DIM)):
            channel = number * channel_tile(HEAD_DIM) + tl.arange(0, channel_tile(HEAD_DIM))
            at = (
                first_key
                + (slot.to(tl.int64) * aligned(key.token, ALIGNED))[:, None]
                + (channel * key.channel)[None, :]
            )
            loaded = tl.load(at, mask=inside[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
            score = tl.dot(loaded.to(DOT), query[number], score, input_precision="ieee")
        allowed = occupied[:, None]
        if CAUSAL:
            allowed = allowed & (slot[:, None] <= (row % sizes.head_rows)[None, :])
        score = masked(score * scale, position, allowed, row, row_ok, b, masks, sizes.head_rows, MASK, MASK_ROWS)
        if KEEP_SCORES:
            at = (b * share.all_slots + share.first_slot + slot) * sizes.all_rows
            both = inside[:, None] & row_ok[None, :]
            tl.store(results.scores + at[:, None] + row[None, :], score, mask=both)
        weight, fade, top, total = softmax_step(score, top, total)
        rounded = weight.to(DOT)
        updated = ()
        for number in tl.static_range(channel_tiles(VALUE_DIM)):
            channel = number * channel_tile(VALUE_DIM) + tl.arange(0, channel_tile(VALUE_DIM))
            at = (
                first_value
                + (slot.to(tl.int64) * aligned(value.token, ALIGNED))[:, None]
                + (channel * value.channel)[None, :]
            )
            loaded = tl.load(at, mask=occupied[:, None] & (channel < VALUE_DIM)[None, :], other=0.0)
            sofar = accumulated[number] * fade[None, :]
            updated = updated + (tl.dot(tl.trans(loaded.to(DOT)), rounded, sofar, input_precision="ieee"),)
        accumulated = updated
    return top, total, accumulated


@triton.jit
def attend_dense(
    work,
    b,
    share,
    segment,
    first,
    new,
    rows,
    results,
    masks,
    sizes,
    cursor,
    scale,
    KIND: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """One split of a dense segment, for one tile of a KV head's rows. The tail's first split has `first` and `new` as well."""
    row_tile = work % share.row_tiles
    split = (work // share.row_tiles) % share.splits
    head = work // (share.row_tiles * share.splits)
    in_unit = row_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    row_ok = in_unit < sizes.kv_rows
    row = head * sizes.kv_rows + in_unit
    query = ()
    start_of = rows.pointer + b * rows.batch + (row // sizes.head_rows) * rows.head + (row % sizes.head_rows) * rows.row
    for number in tl.static_range(channel_tiles(HEAD_DIM)):
        channel = number * channel_tile(HEAD_DIM) + tl.arange(0, channel_tile(HEAD_DIM))
        at = start_of[None, :] + (channel * rows.channel)[:, None]
        loaded = tl.load(at, mask=row_ok[None, :] & (channel < HEAD_DIM)[:, None], other=0.0)
        query = query + (loaded.to(DOT),)
    accumulated = ()
    for _ in tl.static_range(channel_tiles(VALUE_DIM)):
        accumulated = accumulated + (tl.zeros((channel_tile(VALUE_DIM), ROW_TILE), tl.float32),)
    top = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    held, packed = tl.load(cursor), tl.load(cursor + 1)
    end = tl.minimum((split + 1) * share.blocks * BLOCK, share.slots)
    if segment.read is not None:
        end = tl.minimum(end, tl.load(segment.read + 2 * b + 1))
    first_end = tl.where(split == 0, sizes.first_slots, 0)
    new_end = tl.where(split == 0, sizes.new_tokens, 0)
    # fmt: off
    top, total, accumulated = dense_range(
        top, total, accumulated, query, split * share.blocks * BLOCK, end, b, head, segment, share.slots, share,
        row, row_ok, results, masks, sizes, scale, held, packed,
        KIND, KEEP_SCORES, ALIGNED, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DOT, STEP, STAGES, ROW_TILE,
    )
    if KIND == BY_RING:
        top, total, accumulated = dense_range(
            top, total, accumulated, query, 0, first_end, b, head, first, sizes.first_slots, share,
            row, row_ok, results, masks, sizes, scale, held, packed,
            BY_INDEX, False, ALIGNED, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DOT, STEP, 1, ROW_TILE,
        )
        top, total, accumulated = dense_range(
            top, total, accumulated, query, 0, new_end, b, head, new, sizes.new_tokens, share,
            row, row_ok, results, masks, sizes, scale, held, packed,
            BY_ORDER, False, ALIGNED, CAUSAL, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DOT, STEP, 1, ROW_TILE,
        )
    # fmt: on
    lse, inverse = log_sum_exp(top, total)
    at_split = b * share.all_splits + share.first_split + split
    tl.store(results.lse + at_split * sizes.all_rows + row, lse, mask=row_ok)
    at_part = ((b * share.parts + share.first_part + split) * sizes.all_rows + row) * VALUE_DIM
    for number in tl.static_range(channel_tiles(VALUE_DIM)):
        channel = number * channel_tile(VALUE_DIM) + tl.arange(0, channel_tile(VALUE_DIM))
        out = accumulated[number] * inverse[None, :]
        both = row_ok[None, :] & (channel < VALUE_DIM)[:, None]
        tl.store(results.dense + at_part[None, :] + channel[:, None], out, mask=both)
