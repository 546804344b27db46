"""The pass over codes: scores, softmax and latent outputs of one split of a packed segment, for all rows of a head group.

Where rows come first, scores are `[rows, tokens]`, and one warp does it all: its weights stay in the registers where the product with the
values wants them. Else scores are `[tokens, rows]`, and warps share the tokens: for rows so few that they would be padded to the 16 of
the matrix unit's first side, or columns so many that their sums do not fit in the registers of one warp.
"""

import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_softmax import log_sum_exp, masked, of_others, of_rows, softmax_step
from apack_compile.kernels.triton_bands import BAND_COUNT, component_count, first_component, is_float, token_bytes
from apack_compile.kernels.triton_words import (
    GIVEN,
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
def zeros(rows: tl.constexpr, others: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Zeros, float32, of rows against others."""
    return tl.zeros((rows, others), tl.float32) if ROWS_FIRST else tl.zeros((others, rows), tl.float32)


@triton.jit
def multiplied(of_row, other, total, ROWS_FIRST: tl.constexpr):
    """The total with the product of numbers of rows and others added."""
    if ROWS_FIRST:
        return tl.dot(of_row, other, total, input_precision="ieee")
    else:
        return tl.dot(other, of_row, total, input_precision="ieee")


@triton.jit
def load_latent(
    latent,
    row_ok,
    LAYOUT: tl.constexpr,
    BAND: tl.constexpr,
    NUMBER: tl.constexpr,
    FIELD: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """Latents of one tile of components, of rows against them; latent: pointer to those of the first row."""
    column = tile_column(LAYOUT, BAND, NUMBER, FIELD) + tl.arange(0, tile(LAYOUT, BAND))
    at = latent + (
        of_rows(tl.arange(0, row_ok.shape[0]) * column_count(LAYOUT), ROWS_FIRST) + of_others(column, ROWS_FIRST)
    )
    return tl.load(at, mask=of_rows(row_ok, ROWS_FIRST), other=0.0)


@triton.jit
def load_query(latent, row_ok, LAYOUT: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """All latents, tile by tile."""
    query = ()
    for band in tl.static_range(BAND_COUNT):
        for number in tl.static_range(tiles(LAYOUT, band)):
            for field in tl.static_range(fields(band)):
                query = query + (load_latent(latent, row_ok, LAYOUT, band, number, field, ROWS_FIRST),)
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
def places(work, share, sizes, ROW_TILE: tl.constexpr):
    """Split, group, first row of a program, and its rows `[rows]` with which of them there are."""
    row_tile = work % share.row_tiles
    split = (work // share.row_tiles) % share.splits
    unit = work // (share.row_tiles * share.splits)
    row_ok = row_tile * ROW_TILE + tl.arange(0, ROW_TILE) < sizes.group_rows
    first_row = unit * sizes.group_rows + row_tile * ROW_TILE
    return split, unit, first_row, first_row + tl.arange(0, ROW_TILE), row_ok


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
    ROWS_FIRST: tl.constexpr,
):
    """One split of a packed segment, for one tile of a head group's rows.

    A pass has the value tiles from VALUE_TILES[0] to VALUE_TILES[1]; those after the first read its scores. RESIDENT: query latents are
    loaded once, not for every tile. ANCHOR_SLOTS: slots that share an anchor, in whose latents the query is rotated back; 0 where keys are
    not relative. They are whole blocks of tokens.
    """
    split, unit, first_row, row, row_ok = places(work, share, sizes, ROW_TILE)
    rows = segment.query

    if FIRST_PASS and ANCHOR_SLOTS == 0:
        latent = rows.latent + (b * sizes.all_rows + first_row) * column_count(KEY)
        if RESIDENT:
            query = load_query(latent, row_ok, KEY, ROWS_FIRST)
        offset, factor, shift = load_affine(rows, b, first_row, row_ok, sizes.all_rows, KEY, DOT)
    accumulated = ()
    for band in tl.static_range(BAND_COUNT):
        for number in tl.static_range(tiles(VALUE, band)):
            if in_pass(VALUE, band, number, VALUE_TILES):
                for _ in tl.static_range(fields(band)):
                    accumulated = accumulated + (zeros(ROW_TILE, tile(VALUE, band), ROWS_FIRST),)
    top = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((ROW_TILE,), tl.float32)
    # sums of weights, all the same for a row: the matrix unit adds them up in fewer instructions than lanes would
    alike: tl.constexpr = GIVEN if ROWS_FIRST else SUM_ROWS
    ones = tl.full((BLOCK, alike) if ROWS_FIRST else (alike, BLOCK), 1.0, DOT)
    weight_sum = zeros(ROW_TILE, alike, ROWS_FIRST)
    full_sum = zeros(ROW_TILE, alike, ROWS_FIRST)

    stored_end = tl.minimum(tl.load(cursor + 1), tl.load(cursor) - sizes.new_tokens)
    end = tl.minimum((split + 1) * share.blocks * BLOCK, share.slots)
    full = share.slots
    if segment.read is not None:
        full = tl.load(segment.read + 2 * b)
        end = tl.minimum(end, tl.load(segment.read + 2 * b + 1))
    stored = b * segment.next_batch
    first_token = (stored * sizes.groups + unit) * share.slots
    # what does not change from block to block would be held in registers, and there are none to spare
    for start in tl.range(split * share.blocks * BLOCK, end, BLOCK, disable_licm=True):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < end
        token = first_token + start
        position = tl.load(segment.positions + stored * share.slots + slot, mask=inside, other=-1)
        occupied = (position >= 0) & (position < stored_end)
        if FIRST_PASS:
            if ANCHOR_SLOTS > 0:
                copy = b * share.anchors + start // ANCHOR_SLOTS
                latent = rows.latent + (copy * sizes.all_rows + first_row) * column_count(KEY)
            score = zeros(ROW_TILE, BLOCK, ROWS_FIRST)
            key = segment.key + first_token * elements(KEY, segment.key.dtype.element_ty)
            done = ()
            for band in tl.static_range(BAND_COUNT):
                for number in tl.static_range(tiles(KEY, band)):
                    loaded = load_words(key, start, inside[:, None], KEY, band, number)
                    # transposed as words, whole 16-bit units; their fields come apart in registers
                    level = levels(tl.trans(loaded) if ROWS_FIRST else loaded, band, DOT, ASSEMBLY)
                    for field in tl.static_range(fields(band)):
                        if RESIDENT:
                            operand = query[len(done)]
                        else:
                            operand = load_latent(latent, row_ok, KEY, band, number, field, ROWS_FIRST)
                        score = multiplied(operand, level[field], score, ROWS_FIRST)
                        done = done + (0,)
                if is_float(band) and KEY[band] > 0:
                    score *= score_unit(KEY, DOT)
            if ANCHOR_SLOTS > 0:
                # loaded not before they are needed: registers are short here
                offset, factor, shift = load_affine(rows, copy, first_row, row_ok, sizes.all_rows, KEY, DOT)
            score = score * of_rows(factor, ROWS_FIRST) - of_rows(offset, ROWS_FIRST)
            if segment.key_scale is not None:
                scale = tl.load(segment.key_scale + token + tl.arange(0, BLOCK), mask=inside, other=0.0)
                score = score * of_others(scale.to(tl.float32), ROWS_FIRST) + of_rows(shift, ROWS_FIRST)
            else:
                score += of_rows(shift, ROWS_FIRST)
            read = of_others(occupied, ROWS_FIRST)
            score = masked(score, position, read, row, row_ok, b, masks, sizes.head_rows, MASK, MASK_ROWS, ROWS_FIRST)
        if KEEP_SCORES or not FIRST_PASS:
            at = (b * share.all_slots + share.first_slot + slot) * sizes.all_rows
            at_score = results.scores + of_others(at, ROWS_FIRST) + of_rows(row, ROWS_FIRST)
            both = of_others(inside, ROWS_FIRST) & of_rows(row_ok, ROWS_FIRST)
            if FIRST_PASS:
                tl.store(at_score, score, mask=both)
            else:
                score = tl.load(at_score, mask=both, other=float("-inf"))

        weight, fade, top, total = softmax_step(score, top, total, ROWS_FIRST)
        fade = of_rows(fade, ROWS_FIRST)
        if segment.value_scale is not None:
            scale = tl.load(segment.value_scale + token + tl.arange(0, BLOCK), mask=inside, other=0.0)
            # an empty slot's scale may be NaN, and a weight of 0 would not stop it
            weight *= of_others(tl.where(occupied, scale.to(tl.float32), 0.0), ROWS_FIRST)
        rounded = weight.to(DOT)
        weight_sum = multiplied(rounded, ones, weight_sum * fade, ROWS_FIRST)
        if PARTIAL < component_count(VALUE):
            of_full = slot < full
            rounded_full = tl.where(of_others(of_full, ROWS_FIRST), rounded, 0.0)
            full_sum = multiplied(rounded_full, ones, full_sum * fade, ROWS_FIRST)
        value = segment.value + first_token * elements(VALUE, segment.value.dtype.element_ty)
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
                    loaded = load_words(value, start, wanted[:, None], VALUE, band, number)
                    level = levels(loaded if ROWS_FIRST else tl.trans(loaded), band, DOT, ASSEMBLY)
                    for field in tl.static_range(fields(band)):
                        operand, number_of = rounded, level[field]
                        if tile_tier(VALUE, band, number, PARTIAL) == 1:
                            word = number * tile(VALUE, band) + tl.arange(0, tile(VALUE, band))
                            component = first_component(VALUE, band) + word * fields(band) + field
                            leading = component < PARTIAL
                            if ROWS_FIRST:
                                kept = leading[None, :] | of_full[:, None]
                            else:
                                kept = leading[:, None] | of_full[None, :]
                            number_of = tl.where(kept, number_of, 0.0)
                        if tile_tier(VALUE, band, number, PARTIAL) == 2:
                            operand = rounded_full
                        sofar = accumulated[len(updated)] * fade
                        updated = updated + (multiplied(operand, number_of, sofar, ROWS_FIRST),)
        accumulated = updated

    if ASSEMBLY:
        # to the compiler another number, so that nothing that is made of it takes registers through the loop
        work = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [work], dtype=tl.int32, is_pure=False, pack=1)
    split, _, _, row, row_ok = places(work, share, sizes, ROW_TILE)
    weight_sum = of_rows(tl.max(weight_sum, 1 if ROWS_FIRST else 0), ROWS_FIRST)
    full_sum = of_rows(tl.max(full_sum, 1 if ROWS_FIRST else 0), ROWS_FIRST)
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
                        summed = tl.where(of_others(component < PARTIAL, ROWS_FIRST), summed, full_sum)
                    own = accumulated[len(written)] * (1.0 / field_unit(band, field, DOT))
                    out = (own - level_offset(band, DOT) * summed) * of_rows(inverse, ROWS_FIRST)
                    column = tile_column(VALUE, band, number, field) + tl.arange(0, tile(VALUE, band))
                    at = segment.part + of_rows(at_part, ROWS_FIRST) + of_others(column, ROWS_FIRST)
                    tl.store(at, out, mask=of_rows(row_ok, ROWS_FIRST))
                    written = written + (0,)
