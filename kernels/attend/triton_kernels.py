"""The pass over the codes: scores, online softmax and latent outputs of one split of a segment, for all query rows of a head group.

Scores are kept transposed, `[tokens, rows]`: tokens are many and rows few, and the matrix unit wants its tall side tall.
Scores and log-sum-exps are in base 2. A *unit* is what shares one copy of the tokens: a head group where they are packed, a KV head where
they are dense. Row r of `[B, H_q * rows]` is row `r % rows` of query head `r // rows`; a unit's rows are contiguous.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from apack_compile.kernels.triton_bands import (
    first_byte,
    first_column,
    first_component,
    level_offset,
    levels,
    load_units,
    per_byte,
    tile,
    tile_column,
    tile_number,
    tile_units,
    tiles,
)

LOG2E = tl.constexpr(1.4426950408889634)
# What a segment is (constexprs of the launch): not there, packed, dense.
ABSENT, PACKED_SEGMENT, DENSE_SEGMENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# How a dense slot gets its position: from `positions`, from the tail's ring, or because it is one of the new tokens.
BY_INDEX, BY_RING, BY_ORDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Strided(NamedTuple):
    """Dense tokens `[B, H, N, D]`; head h is `h % per` of group `h // per`."""

    pointer: Tensor
    batch: int
    group: int
    head: int
    token: int
    channel: int
    per: int


class Segment(NamedTuple):
    """What a segment stores. Packed: codes and token scales; dense: `Strided` keys and values. positions: `[B, slots]` or None."""

    key: Tensor | Strided | None = None
    key_scale: Tensor | None = None
    value: Tensor | Strided | None = None
    value_scale: Tensor | None = None
    positions: Tensor | None = None
    slots: int = 0


class Rows(NamedTuple):
    """Query rows `[B, H_q, rows, D]`, and as latents: `[B, all rows, columns]` with a row scale and a shift `[B, all rows]`."""

    pointer: Tensor
    batch: int
    head: int
    row: int
    channel: int
    latent: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class Masks(NamedTuple):
    """Mask (uint8 or float) with strides of batch, head, row and token, bias with strides of batch and token; columns of both."""

    mask: Tensor | None
    batch: int
    head: int
    row: int
    token: int
    columns: int
    bias: Tensor | None
    bias_batch: int
    bias_token: int
    bias_columns: int


class Share(NamedTuple):
    """A segment's part of the grid, and where its results go: programs, splits, row tiles and blocks a split; first split and slot."""

    programs: int
    splits: int
    row_tiles: int
    blocks: int
    first_split: int
    first_slot: int


class Sizes(NamedTuple):
    """Query rows of a batch row, rows of a query head, rows of a group and of a KV head, KV heads, new tokens, splits and slots in all."""

    all_rows: int
    head_rows: int
    group_rows: int
    kv_rows: int
    groups: int
    kv_heads: int
    new_tokens: int
    splits: int
    slots: int


class Results(NamedTuple):
    """Per split: log-sum-exp `[B, splits, rows]`, latents `[B, own splits, rows, columns]`; scores `[B, slots, rows]` or None."""

    lse: Tensor
    vision: Tensor | None
    text: Tensor | None
    dense: Tensor
    dense_splits: int
    scores: Tensor | None


@triton.constexpr_function
def in_pass(counts, band, number, value_tiles):
    """Whether a pass that has the value tiles from the first number to the second has this one."""
    return value_tiles[0] <= tile_number(counts, band, number) < value_tiles[1]


@triton.constexpr_function
def tile_tier(counts, band, number, partial):
    """Whether a tile's components are all leading ones (0), none of them (2), or both (1)."""
    start = first_component(counts, band) + per_byte(band) * tile(counts, band) * number
    end = min(start + per_byte(band) * tile(counts, band), first_component(counts, band + 1))
    return 0 if end <= partial else 2 if start >= partial else 1


@triton.jit
def masked(score, position, occupied, row, row_ok, b, masks, head_rows, MASK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Scores with mask and bias by position; -inf where nothing may be attended. MASK: 0 none, 1 bool, 2 float."""
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
    if masks.bias is not None:
        column = tl.minimum(tl.maximum(position, 0), masks.bias_columns - 1)
        added = tl.load(masks.bias + b * masks.bias_batch + column * masks.bias_token)
        score += added.to(tl.float32)[:, None] * LOG2E
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


@triton.jit
def load_latent(
    latent, at_row, row_ok, COUNTS: tl.constexpr, BAND: tl.constexpr, NUMBER: tl.constexpr, PLACE: tl.constexpr
):
    """Latents `[tile, rows]` of one tile of components."""
    column = tile_column(COUNTS, BAND, NUMBER, PLACE) + tl.arange(0, tile(COUNTS, BAND))
    at = latent + (at_row * first_column(COUNTS, 4))[None, :] + column[:, None]
    return tl.load(at, mask=row_ok[None, :], other=0.0)


@triton.jit
def load_query(
    latent, at_row, row_ok, COUNTS: tl.constexpr, RESIDENT: tl.constexpr, DOT: tl.constexpr, ROW_TILE: tl.constexpr
):
    """All latents, if RESIDENT, and what the levels' offset adds to their scores."""
    query = ()
    offset = tl.zeros((ROW_TILE,), tl.float32)
    for band in tl.static_range(4):
        for number in tl.static_range(tiles(COUNTS, band)):
            for place in tl.static_range(per_byte(band)):
                loaded = load_latent(latent, at_row, row_ok, COUNTS, band, number, place)
                offset += level_offset(band, DOT) * tl.sum(loaded.to(tl.float32), 0)
                if RESIDENT:
                    query = query + (loaded,)
    return query, offset


@triton.jit
def attend_packed(
    work,
    b,
    share,
    segment,
    rows,
    part,
    results,
    masks,
    sizes,
    cursor,
    read,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_EVEN: tl.constexpr,
    VALUE_EVEN: tl.constexpr,
    PARTIAL: tl.constexpr,
    FIRST_PASS: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    RESIDENT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """One split of a packed segment, for one tile of a head group's rows.

    A pass has the value tiles from VALUE_TILES[0] to VALUE_TILES[1]; those after the first read its scores. RESIDENT: query latents are
    loaded once, not for every block. read: pointer to the two tier counts, or None.
    """
    row_tile = work % share.row_tiles
    split = (work // share.row_tiles) % share.splits
    unit = work // (share.row_tiles * share.splits)
    in_unit = row_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    row_ok = in_unit < sizes.group_rows
    row = unit * sizes.group_rows + in_unit
    at_row = b * sizes.all_rows + row

    query = ()
    if FIRST_PASS:
        query, offset = load_query(rows.latent, at_row, row_ok, KEY, RESIDENT, DOT, ROW_TILE)
        row_scale = tl.load(rows.scale + at_row, mask=row_ok, other=0.0)
        shift = tl.load(rows.shift + at_row, mask=row_ok, other=0.0)
    accumulated = ()
    for band in tl.static_range(4):
        for number in tl.static_range(tiles(VALUE, band)):
            if in_pass(VALUE, band, number, VALUE_TILES):
                for _ in tl.static_range(per_byte(band)):
                    accumulated = accumulated + (tl.zeros((tile(VALUE, band), ROW_TILE), tl.float32),)
    top = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    weight_sum = tl.zeros((ROW_TILE,), tl.float32)
    full_sum = tl.zeros((ROW_TILE,), tl.float32)

    stored_end = tl.minimum(tl.load(cursor + 1), tl.load(cursor) - sizes.new_tokens)
    end = tl.minimum((split + 1) * share.blocks * BLOCK, segment.slots)
    full = segment.slots
    if read is not None:
        full = tl.load(read + 2 * b)
        end = tl.minimum(end, tl.load(read + 2 * b + 1))
    first_token = (b * sizes.groups + unit) * segment.slots
    for start in range(split * share.blocks * BLOCK, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < end
        token = first_token + slot
        position = tl.load(segment.positions + b * segment.slots + slot, mask=inside, other=-1)
        occupied = (position >= 0) & (position < stored_end)
        if FIRST_PASS:
            score = tl.zeros((BLOCK, ROW_TILE), tl.float32)
            key = segment.key + (token * first_byte(KEY, 4))[:, None]
            done = ()
            for band in tl.static_range(4):
                for number in tl.static_range(tiles(KEY, band)):
                    units = load_units(key, inside[:, None], KEY, band, number, KEY_EVEN)
                    for place in tl.static_range(per_byte(band)):
                        at_level = levels(units, band, place, DOT)
                        if RESIDENT:
                            latent = query[len(done)]
                        else:
                            latent = load_latent(rows.latent, at_row, row_ok, KEY, band, number, place)
                        score = tl.dot(at_level, latent, score, input_precision="ieee")
                        done = done + (0,)
            score = (score - offset[None, :]) * row_scale[None, :]
            if segment.key_scale is not None:
                score *= tl.load(segment.key_scale + token, mask=inside, other=0.0).to(tl.float32)[:, None]
            score += shift[None, :]
            score = masked(score, position, occupied[:, None], row, row_ok, b, masks, sizes.head_rows, MASK, MASK_ROWS)
        if KEEP_SCORES or not FIRST_PASS:
            at = (b * sizes.slots + share.first_slot + slot) * sizes.all_rows
            at_score = results.scores + at[:, None] + row[None, :]
            both = inside[:, None] & row_ok[None, :]
            if FIRST_PASS:
                tl.store(at_score, score, mask=both)
            else:
                score = tl.load(at_score, mask=both, other=float("-inf"))

        weight, fade, top, total = softmax_step(score, top, total)
        if segment.value_scale is not None:
            weight *= tl.load(segment.value_scale + token, mask=inside, other=0.0).to(tl.float32)[:, None]
            # an empty slot's scale may be NaN
            weight = tl.where(occupied[:, None], weight, 0.0)
        of_full = (slot < full)[:, None]
        rounded = weight.to(DOT)
        rounded_full = tl.where(of_full, rounded, 0.0)
        weight_sum = weight_sum * fade + tl.sum(rounded.to(tl.float32), 0)
        full_sum = full_sum * fade + tl.sum(rounded_full.to(tl.float32), 0)
        value = segment.value + (token * first_byte(VALUE, 4))[:, None]
        updated = ()
        for band in tl.static_range(4):
            for number in tl.static_range(tiles(VALUE, band)):
                if in_pass(VALUE, band, number, VALUE_TILES):
                    wanted = inside[:, None]
                    if tile_tier(VALUE, band, number, PARTIAL) == 2:
                        wanted = wanted & of_full
                    if band == 0:
                        # an empty slot's float16 may be NaN, and a weight of 0 would not stop it
                        wanted = wanted & occupied[:, None]
                    units = load_units(value, wanted, VALUE, band, number, VALUE_EVEN)
                    for place in tl.static_range(per_byte(band)):
                        at_level = levels(units, band, place, DOT)
                        if tile_tier(VALUE, band, number, PARTIAL) == 1:
                            unit_number = number * tile(VALUE, band) + tl.arange(0, tile(VALUE, band))
                            component = first_component(VALUE, band) + unit_number * per_byte(band) + place
                            at_level = tl.where((component < PARTIAL)[None, :] | of_full, at_level, 0.0)
                        operand = rounded
                        if tile_tier(VALUE, band, number, PARTIAL) == 2:
                            operand = rounded_full
                        sofar = accumulated[len(updated)] * fade[None, :]
                        updated = updated + (tl.dot(tl.trans(at_level), operand, sofar, input_precision="ieee"),)
        accumulated = updated

    lse, inverse = log_sum_exp(top, total)
    at_split = b * sizes.splits + share.first_split + split
    if FIRST_PASS:
        tl.store(results.lse + at_split * sizes.all_rows + row, lse, mask=row_ok)
    written = ()
    at_part = ((b * share.splits + split) * sizes.all_rows + row) * first_column(VALUE, 4)
    for band in tl.static_range(4):
        for number in tl.static_range(tiles(VALUE, band)):
            if in_pass(VALUE, band, number, VALUE_TILES):
                for place in tl.static_range(per_byte(band)):
                    unit_number = number * tile(VALUE, band) + tl.arange(0, tile(VALUE, band))
                    component = first_component(VALUE, band) + unit_number * per_byte(band) + place
                    summed = tl.where((component < PARTIAL)[:, None], weight_sum[None, :], full_sum[None, :])
                    out = (accumulated[len(written)] - level_offset(band, DOT) * summed) * inverse[None, :]
                    column = tile_column(VALUE, band, number, place) + tl.arange(0, tile(VALUE, band))
                    tl.store(part + at_part[None, :] + column[:, None], out, mask=row_ok[None, :])
                    written = written + (0,)


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
    first_slot,
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
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Online softmax over the slots from `start_at` to `end` of a dense segment; the updated maximum, sum and output tiles."""
    key, value = segment.key, segment.value
    first_key = key.pointer + b * key.batch + (head // key.per) * key.group + (head % key.per) * key.head
    first_value = value.pointer + b * value.batch + (head // value.per) * value.group + (head % value.per) * value.head
    before = held - sizes.new_tokens
    for start in range(start_at, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < end
        if KIND == BY_INDEX:
            position = tl.load(segment.positions + b * segment.slots + slot, mask=inside, other=-1)
            occupied = (position >= 0) & (position < tl.minimum(packed, before))
        elif KIND == BY_RING:
            # the remainder is taken of a number >= 0, where compiled code and Python agree
            position = packed + (slot - packed % segment.slots + segment.slots) % segment.slots
            occupied = inside & (position < before)
        else:
            position = before + slot
            occupied = inside
        score = tl.zeros((BLOCK, ROW_TILE), tl.float32)
        for number in tl.static_range(tiles((HEAD_DIM, 0, 0, 0), 0)):
            width: tl.constexpr = tile((HEAD_DIM, 0, 0, 0), 0)
            channel = number * width + tl.arange(0, width)
            at = first_key + (slot.to(tl.int64) * key.token)[:, None] + (channel * key.channel)[None, :]
            loaded = tl.load(at, mask=inside[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
            score = tl.dot(loaded.to(DOT), query[number], score, input_precision="ieee")
        allowed = occupied[:, None]
        if CAUSAL:
            allowed = allowed & (slot[:, None] <= (row % sizes.head_rows)[None, :])
        score = masked(score * scale, position, allowed, row, row_ok, b, masks, sizes.head_rows, MASK, MASK_ROWS)
        if KEEP_SCORES:
            at = (b * sizes.slots + first_slot + slot) * sizes.all_rows
            both = inside[:, None] & row_ok[None, :]
            tl.store(results.scores + at[:, None] + row[None, :], score, mask=both)
        weight, fade, top, total = softmax_step(score, top, total)
        rounded = weight.to(DOT)
        updated = ()
        for number in tl.static_range(tiles((VALUE_DIM, 0, 0, 0), 0)):
            width_v: tl.constexpr = tile((VALUE_DIM, 0, 0, 0), 0)
            channel = number * width_v + tl.arange(0, width_v)
            at = first_value + (slot.to(tl.int64) * value.token)[:, None] + (channel * value.channel)[None, :]
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
    read,
    scale,
    KIND: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
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
    for number in tl.static_range(tiles((HEAD_DIM, 0, 0, 0), 0)):
        width: tl.constexpr = tile((HEAD_DIM, 0, 0, 0), 0)
        channel = number * width + tl.arange(0, width)
        at = start_of[None, :] + (channel * rows.channel)[:, None]
        loaded = tl.load(at, mask=row_ok[None, :] & (channel < HEAD_DIM)[:, None], other=0.0)
        query = query + (loaded.to(DOT),)
    accumulated = ()
    for _ in tl.static_range(tiles((VALUE_DIM, 0, 0, 0), 0)):
        accumulated = accumulated + (tl.zeros((tile((VALUE_DIM, 0, 0, 0), 0), ROW_TILE), tl.float32),)
    top = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    held, packed = tl.load(cursor), tl.load(cursor + 1)
    end = tl.minimum((split + 1) * share.blocks * BLOCK, segment.slots)
    if read is not None:
        end = tl.minimum(end, tl.load(read + 2 * b + 1))
    # fmt: off
    top, total, accumulated = dense_range(
        top, total, accumulated, query, split * share.blocks * BLOCK, end, b, head, segment, share.first_slot, row, row_ok,
        results, masks, sizes, scale, held, packed,
        KIND, KEEP_SCORES, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DOT, BLOCK, ROW_TILE,
    )
    if KIND == BY_RING:
        top, total, accumulated = dense_range(
            top, total, accumulated, query, 0, tl.where(split == 0, first.slots, 0), b, head, first, 0, row, row_ok,
            results, masks, sizes, scale, held, packed,
            BY_INDEX, False, False, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DOT, BLOCK, ROW_TILE,
        )
        top, total, accumulated = dense_range(
            top, total, accumulated, query, 0, tl.where(split == 0, new.slots, 0), b, head, new, 0, row, row_ok,
            results, masks, sizes, scale, held, packed,
            BY_ORDER, False, CAUSAL, HEAD_DIM, VALUE_DIM, MASK, MASK_ROWS, DOT, BLOCK, ROW_TILE,
        )
    # fmt: on
    lse, inverse = log_sum_exp(top, total)
    at_split = share.first_split + split
    tl.store(results.lse + (b * sizes.splits + at_split) * sizes.all_rows + row, lse, mask=row_ok)
    at_part = ((b * results.dense_splits + at_split) * sizes.all_rows + row) * VALUE_DIM
    for number in tl.static_range(tiles((VALUE_DIM, 0, 0, 0), 0)):
        width_v: tl.constexpr = tile((VALUE_DIM, 0, 0, 0), 0)
        channel = number * width_v + tl.arange(0, width_v)
        out = accumulated[number] * inverse[None, :]
        both = row_ok[None, :] & (channel < VALUE_DIM)[:, None]
        tl.store(results.dense + at_part[None, :] + channel[:, None], out, mask=both)


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
