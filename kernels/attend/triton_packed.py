"""The pass over codes: scores, softmax and latent outputs of one split of a packed segment, for all rows of a head group.

Scores are kept transposed, `[tokens, rows]`: tokens are many and rows few, and the matrix unit wants its tall side tall.
"""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_softmax import log_sum_exp, masked, softmax_step
from apack_compile.kernels.triton_bands import BAND_COUNT, component_count, first_component, is_float, token_bytes
from apack_compile.kernels.triton_words import (
    SMALLEST,
    SUM_ROWS,
    column_blocks,
    column_count,
    field_unit,
    fields,
    has_levels,
    level_offset,
    levels,
    load_words,
    tile,
    tile_column,
    tile_number,
    tiles,
)


@triton.constexpr_function
def in_pass(layout, band, number, value_tiles):
    """Whether a pass that has the value tiles from the first number to the second has this one."""
    return value_tiles[0] <= tile_number(layout, band, number) < value_tiles[1]


@triton.constexpr_function
def tile_tier(layout, band, number, partial):
    """Whether a tile's components are all leading ones (0), none of them (2), or both (1)."""
    start = first_component(layout, band) + fields(band) * tile(layout, band) * number
    end = min(start + fields(band) * tile(layout, band), first_component(layout, band + 1))
    return 0 if end <= partial else 2 if start >= partial else 1


@triton.jit
def load_latent(latent, row_ok, LAYOUT: tl.constexpr, BAND: tl.constexpr, NUMBER: tl.constexpr, FIELD: tl.constexpr):
    """Latents `[tile, rows]` of one tile of components; latent: pointer to those of the first row."""
    column = tile_column(LAYOUT, BAND, NUMBER, FIELD) + tl.arange(0, tile(LAYOUT, BAND))
    of_row = tl.arange(0, row_ok.shape[0]) * column_count(LAYOUT)
    return tl.load(latent + (of_row[None, :] + column[:, None]), mask=row_ok[None, :], other=0.0)


@triton.jit
def load_query(latent, row_ok, LAYOUT: tl.constexpr):
    """All latents, tile by tile."""
    query = ()
    for band in tl.static_range(BAND_COUNT):
        for number in tl.static_range(tiles(LAYOUT, band)):
            for field in tl.static_range(fields(band)):
                query = query + (load_latent(latent, row_ok, LAYOUT, band, number, field),)
    return query


@triton.constexpr_function
def score_unit(layout, dot):
    """What a score's sums are in units of."""
    return SMALLEST.value if dot == tl.float16 and has_levels(layout) else 1.0


@triton.constexpr_function
def elements(layout, dtype):
    """Elements of a token's codes, which are read as int16 or as uint8."""
    return token_bytes(layout) // (2 if dtype == tl.int16 else 1)


@triton.jit
def load_affine(rows, copy, first_row, row_ok, all_rows, LAYOUT: tl.constexpr, DOT: tl.constexpr):
    """What makes scores of sums, per row: offset, factor, shift of `sum * factor - offset`, times a token's scale, plus the shift.

    copy: of all rows, by sequence and anchor.
    """
    row = first_row + tl.arange(0, row_ok.shape[0])
    scale = tl.load(rows.scale + copy * all_rows + row, mask=row_ok, other=0.0)
    shift = tl.load(rows.shift + copy * all_rows + row, mask=row_ok, other=0.0)
    offset = tl.zeros(row.shape, tl.float32)
    if rows.offset is not None:
        block = tl.arange(0, triton.next_power_of_2(column_blocks(LAYOUT)))
        real = (block < column_blocks(LAYOUT))[:, None] & row_ok[None, :]
        at = rows.offset + copy * column_blocks(LAYOUT) * all_rows + (block[:, None] * all_rows + row[None, :])
        offset = tl.sum(tl.load(at, mask=real, other=0.0), 0) * scale
    return offset, scale * (1.0 / score_unit(LAYOUT, DOT)), shift


@triton.jit
def attend_packed(
    work,
    b,
    share,
    segment,
    results,
    masks,
    sizes,
    cursor,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PARTIAL: tl.constexpr,
    FIRST_PASS: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    RESIDENT: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """One split of a packed segment, for one tile of a head group's rows.

    A pass has the value tiles from VALUE_TILES[0] to VALUE_TILES[1]; those after the first read its scores. RESIDENT: query latents are
    loaded once, not for every tile. ANCHOR_SLOTS: slots that share an anchor, in whose latents the query is rotated back; 0 where keys are
    not relative. They are whole blocks of tokens.
    """
    row_tile = work % share.row_tiles
    split = (work // share.row_tiles) % share.splits
    unit = work // (share.row_tiles * share.splits)
    in_unit = row_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    row_ok = in_unit < sizes.group_rows
    first_row = unit * sizes.group_rows + row_tile * ROW_TILE
    row = first_row + tl.arange(0, ROW_TILE)
    rows = segment.query

    if FIRST_PASS and ANCHOR_SLOTS == 0:
        latent = rows.latent + (b * sizes.all_rows + first_row) * column_count(KEY)
        if RESIDENT:
            query = load_query(latent, row_ok, KEY)
        offset, factor, shift = load_affine(rows, b, first_row, row_ok, sizes.all_rows, KEY, DOT)
    accumulated = ()
    for band in tl.static_range(BAND_COUNT):
        for number in tl.static_range(tiles(VALUE, band)):
            if in_pass(VALUE, band, number, VALUE_TILES):
                for _ in tl.static_range(fields(band)):
                    accumulated = accumulated + (tl.zeros((tile(VALUE, band), ROW_TILE), tl.float32),)
    top = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    # sums of weights, the same in every row: the matrix unit adds them up in fewer instructions than lanes would
    ones = tl.full((SUM_ROWS, BLOCK), 1.0, DOT)
    weight_sum = tl.zeros((SUM_ROWS, ROW_TILE), tl.float32)
    full_sum = tl.zeros((SUM_ROWS, ROW_TILE), tl.float32)

    stored_end = tl.minimum(tl.load(cursor + 1), tl.load(cursor) - sizes.new_tokens)
    end = tl.minimum((split + 1) * share.blocks * BLOCK, share.slots)
    full = share.slots
    if segment.read is not None:
        full = tl.load(segment.read + 2 * b)
        end = tl.minimum(end, tl.load(segment.read + 2 * b + 1))
    stored = b * segment.next_batch
    first_token = (stored * sizes.groups + unit) * share.slots
    for start in range(split * share.blocks * BLOCK, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < end
        token = first_token + start
        position = tl.load(segment.positions + stored * share.slots + slot, mask=inside, other=-1)
        occupied = (position >= 0) & (position < stored_end)
        if FIRST_PASS:
            if ANCHOR_SLOTS > 0:
                copy = b * share.anchors + start // ANCHOR_SLOTS
                latent = rows.latent + (copy * sizes.all_rows + first_row) * column_count(KEY)
            score = tl.zeros((BLOCK, ROW_TILE), tl.float32)
            key = segment.key + token * elements(KEY, segment.key.dtype.element_ty)
            done = ()
            for band in tl.static_range(BAND_COUNT):
                for number in tl.static_range(tiles(KEY, band)):
                    level = levels(load_words(key, inside[:, None], KEY, band, number), band, DOT, ASSEMBLY)
                    for field in tl.static_range(fields(band)):
                        if RESIDENT:
                            operand = query[len(done)]
                        else:
                            operand = load_latent(latent, row_ok, KEY, band, number, field)
                        score = tl.dot(level[field], operand, score, input_precision="ieee")
                        done = done + (0,)
                if is_float(band) and KEY[band] > 0:
                    score *= score_unit(KEY, DOT)
            if ANCHOR_SLOTS > 0:
                # loaded not before they are needed: registers are short here
                offset, factor, shift = load_affine(rows, copy, first_row, row_ok, sizes.all_rows, KEY, DOT)
            score = score * factor[None, :] - offset[None, :]
            if segment.key_scale is not None:
                scale = tl.load(segment.key_scale + token + tl.arange(0, BLOCK), mask=inside, other=0.0)
                score = score * scale.to(tl.float32)[:, None] + shift[None, :]
            else:
                score += shift[None, :]
            score = masked(score, position, occupied[:, None], row, row_ok, b, masks, sizes.head_rows, MASK, MASK_ROWS)
        if KEEP_SCORES or not FIRST_PASS:
            at = (b * share.all_slots + share.first_slot + slot) * sizes.all_rows
            at_score = results.scores + at[:, None] + row[None, :]
            both = inside[:, None] & row_ok[None, :]
            if FIRST_PASS:
                tl.store(at_score, score, mask=both)
            else:
                score = tl.load(at_score, mask=both, other=float("-inf"))

        weight, fade, top, total = softmax_step(score, top, total)
        if segment.value_scale is not None:
            scale = tl.load(segment.value_scale + token + tl.arange(0, BLOCK), mask=inside, other=0.0)
            # an empty slot's scale may be NaN, and a weight of 0 would not stop it
            weight *= tl.where(occupied, scale.to(tl.float32), 0.0)[:, None]
        rounded = weight.to(DOT)
        weight_sum = tl.dot(ones, rounded, weight_sum * fade[None, :], input_precision="ieee")
        if PARTIAL < component_count(VALUE):
            of_full = slot < full
            rounded_full = tl.where(of_full[:, None], rounded, 0.0)
            full_sum = tl.dot(ones, rounded_full, full_sum * fade[None, :], input_precision="ieee")
        value = segment.value + token * elements(VALUE, segment.value.dtype.element_ty)
        updated = ()
        for band in tl.static_range(BAND_COUNT):
            for number in tl.static_range(tiles(VALUE, band)):
                if in_pass(VALUE, band, number, VALUE_TILES):
                    wanted = inside
                    if tile_tier(VALUE, band, number, PARTIAL) == 2:
                        wanted = wanted & of_full
                    if is_float(band):
                        # an empty slot's float16 may be NaN
                        wanted = wanted & occupied
                    # transposed as words, whole 16-bit units; their fields come apart in registers
                    loaded = tl.trans(load_words(value, wanted[:, None], VALUE, band, number))
                    level = levels(loaded, band, DOT, ASSEMBLY)
                    for field in tl.static_range(fields(band)):
                        operand, number_of = rounded, level[field]
                        if tile_tier(VALUE, band, number, PARTIAL) == 1:
                            word = number * tile(VALUE, band) + tl.arange(0, tile(VALUE, band))
                            component = first_component(VALUE, band) + word * fields(band) + field
                            kept = (component < PARTIAL)[:, None] | of_full[None, :]
                            number_of = tl.where(kept, number_of, 0.0)
                        if tile_tier(VALUE, band, number, PARTIAL) == 2:
                            operand = rounded_full
                        sofar = accumulated[len(updated)] * fade[None, :]
                        updated = updated + (tl.dot(number_of, operand, sofar, input_precision="ieee"),)
        accumulated = updated

    weight_sum, full_sum = tl.max(weight_sum, 0)[None, :], tl.max(full_sum, 0)[None, :]
    lse, inverse = log_sum_exp(top, total)
    at_split = b * share.all_splits + share.first_split + split
    if FIRST_PASS:
        tl.store(results.lse + at_split * sizes.all_rows + row, lse, mask=row_ok)
    written = ()
    at_part = ((b * share.parts + share.first_part + split) * sizes.all_rows + row) * column_count(VALUE)
    for band in tl.static_range(BAND_COUNT):
        for number in tl.static_range(tiles(VALUE, band)):
            if in_pass(VALUE, band, number, VALUE_TILES):
                for field in tl.static_range(fields(band)):
                    word = number * tile(VALUE, band) + tl.arange(0, tile(VALUE, band))
                    component = first_component(VALUE, band) + word * fields(band) + field
                    summed = weight_sum
                    if tile_tier(VALUE, band, number, PARTIAL) > 0:
                        summed = tl.where((component < PARTIAL)[:, None], summed, full_sum)
                    own = accumulated[len(written)] * (1.0 / field_unit(band, field, DOT))
                    out = (own - level_offset(band, DOT) * summed) * inverse[None, :]
                    column = tile_column(VALUE, band, number, field) + tl.arange(0, tile(VALUE, band))
                    tl.store(segment.part + at_part[None, :] + column[:, None], out, mask=row_ok[None, :])
                    written = written + (0,)
