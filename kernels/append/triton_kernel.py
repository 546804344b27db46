"""Triton kernels of `apack::append`: tokens that leave the tail are projected, then coded; new ones enter it."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from apack_compile.kernels.attend.triton_arguments import entry
from apack_compile.kernels.attend.triton_latent import folded_rows
from apack_compile.kernels.encode.triton import quantize_token, token_scale
from apack_compile.kernels.triton_bands import component_count
from apack_compile.kernels.triton_rotations import partner_of, rotated_back


class Dense(NamedTuple):
    """Tokens `[B, H, N, D]` and their strides."""

    pointer: Tensor
    batch: int
    head: int
    token: int
    channel: int


class Stream(NamedTuple):
    """Where one stream is packed: codes `[B, G, N, bytes]` and scales `[B, G, N]` with strides, basis and coefficients.

    next_batch: groups from one sequence's basis to the next, 0 if all share one. coefficients: `[B, G, n, r]`, of the tokens pushed out,
    from the number `at` on.
    """

    codes: Tensor | None = None
    code_batch: int = 0
    code_group: int = 0
    code_token: int = 0
    scales: Tensor | None = None
    scale_batch: int = 0
    scale_group: int = 0
    scale_token: int = 0
    mean: Tensor | None = None
    decoder: Tensor | None = None
    step: Tensor | None = None
    next_batch: int = 0
    coefficients: Tensor | None = None
    at: int = 0


class Side(NamedTuple):
    """Keys or values: the tail, the new tokens, and where those that leave are packed."""

    tail: Dense
    new: Dense
    stream: Stream


@triton.jit
def pushed_tile(
    side, b, token, row_ok, group, channel, held, start, slots, width, HEAD_DIM: tl.constexpr, PER: tl.constexpr
):
    """Channels `[rows, channels]` of a head group, of the tokens that leave: `token` is counted from the oldest in the tail."""
    tail, new = side.tail, side.new
    head = group * PER + channel // HEAD_DIM
    of_head = channel % HEAD_DIM
    position = start + token
    in_tail = position < held
    wanted = row_ok[:, None] & (channel < width)[None, :]
    at_tail = tail.pointer + (b * tail.batch + (position % tl.maximum(slots, 1)) * tail.token)[:, None]
    at_tail += (head * tail.head + of_head * tail.channel)[None, :]
    at_new = new.pointer + (b * new.batch + (position - held) * new.token)[:, None]
    at_new += (head * new.head + of_head * new.channel)[None, :]
    old = tl.load(at_tail, mask=wanted & in_tail[:, None], other=0.0).to(tl.float32)
    newest = tl.load(at_new, mask=wanted & (position >= held)[:, None], other=0.0).to(tl.float32)
    return tl.where(in_tail[:, None], old, newest)


@triton.jit
def leaving_tile(
    side,
    rotations,
    anchors,
    b,
    token,
    row_ok,
    group,
    channel,
    held,
    start,
    origin,
    slots,
    width,
    HEAD_DIM: tl.constexpr,
    PER: tl.constexpr,
    PAIRS: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr,
):
    """Channels of the tokens that leave, rotated back by the anchors of their text slots where there are PAIRS that rotate."""
    x = pushed_tile(side, b, token, row_ok, group, channel, held, start, slots, width, HEAD_DIM, PER)
    if PAIRS > 0:
        of_head = channel % HEAD_DIM
        other = channel - of_head + partner_of(of_head, PAIRS)
        partner = pushed_tile(side, b, token, row_ok, group, other, held, start, slots, width, HEAD_DIM, PER)
        # a token without a slot is not written, whatever its rotation
        anchor = tl.minimum(tl.maximum(start + token - origin, 0) // ANCHOR_SLOTS, anchors - 1)
        x = rotated_back(x, partner, rotations, (b * anchors + anchor) * 2 * PAIRS, row_ok, of_head, PAIRS)
    return x


@triton.jit
def places(cursor, used):
    """The cursor's numbers; without one, those of tokens that go into the slots from `used` on, with no tail."""
    if cursor is None:
        return 0, 0, -used
    else:
        return tl.load(cursor), tl.load(cursor + 1), tl.load(cursor + 2)


@triton.jit
def project_stream(
    side,
    rotations,
    anchors,
    block,
    cursor,
    used,
    batch,
    new_tokens,
    slots,
    groups,
    LAYOUT: tl.constexpr,
    KEPT: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER: tl.constexpr,
    PAIRS: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A block of coefficients of the tokens that leave the tail; the tokens themselves where the stream is KEPT as it is."""
    stream = side.stream
    held, start, origin = places(cursor, used)
    leaving = tl.maximum(held + new_tokens - slots - start, 0)
    group = tl.program_id(1) % groups
    z = (tl.program_id(1) // groups).to(tl.int64)
    b, token, row_ok = folded_rows(tl.program_id(0), z, batch, new_tokens, FOLD, ROW_TILE)
    row_ok = row_ok & (token < leaving)
    width: tl.constexpr = HEAD_DIM * PER
    at_row = (b * groups + group) * new_tokens + token
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    # fmt: off
    if leaving > 0:
        if KEPT:
            out = leaving_tile(
                side, rotations, anchors, b, token, row_ok, group, column, held, start, origin, slots, width,
                HEAD_DIM, PER, PAIRS, ANCHOR_SLOTS,
            )
            at_out = stream.coefficients + stream.at + (at_row * width)[:, None] + column[None, :]
            tl.store(at_out, out, mask=row_ok[:, None] & (column < width)[None, :])
        else:
            rank: tl.constexpr = component_count(LAYOUT)
            at_basis = z * stream.next_batch + group
            summed = tl.zeros((ROW_TILE, COLUMNS), tl.float32)
            for first in range(0, width, CHANNELS):
                channel = first + tl.arange(0, CHANNELS)
                real = channel < width
                x = leaving_tile(
                    side, rotations, anchors, b, token, row_ok, group, channel, held, start, origin, slots, width,
                    HEAD_DIM, PER, PAIRS, ANCHOR_SLOTS,
                )
                mean = tl.load(stream.mean + at_basis * width + channel, mask=real, other=0.0).to(tl.float32)
                at_decoder = stream.decoder + ((at_basis * rank + column) * width)[None, :] + channel[:, None]
                wanted = real[:, None] & (column < rank)[None, :]
                decoder = tl.load(at_decoder, mask=wanted, other=0.0).to(tl.float32)
                summed = tl.dot(x - mean[None, :], decoder, summed, input_precision=PRECISION)
            at_coefficient = stream.coefficients + stream.at + (at_row * rank)[:, None] + column[None, :]
            tl.store(at_coefficient, summed, mask=row_ok[:, None] & (column < rank)[None, :])
    # fmt: on


@triton.jit(do_not_specialize=["anchors", "used"])
def project_kernel(
    sides,
    rotations,
    anchors,
    cursor,
    before,
    used,
    batch,
    new_tokens,
    slots,
    groups,
    LAYOUTS: tl.constexpr,
    KEPT: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FOLD: tl.constexpr,
    PER: tl.constexpr,
    PAIRS: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Coefficients of what leaves the tail. Grid: row tiles; groups (of each sequence); BLOCKS of columns, the keys' first.

    Tuples are of keys and values. rotations: of the text slots' blocks, by which keys are rotated back. cursor: None where there is no
    tail, for tokens that go into the slots from `used` on.
    """
    block = tl.program_id(2)
    if cursor is not None:
        if tl.program_id(0) + tl.program_id(1) + block == 0:
            for i in tl.static_range(3):
                tl.store(before + i, tl.load(cursor + i))
    for i in tl.static_range(2):
        if BLOCKS[i] > 0:
            if block < BLOCKS[i]:
                # fmt: off
                project_stream(
                    sides[i], rotations, anchors, block, cursor, used, batch, new_tokens, slots, groups, entry(LAYOUTS, i), KEPT[i],
                    FOLD, DIMS[i], PER, PAIRS[i], ANCHOR_SLOTS, PRECISION, ROW_TILE, COLUMNS, CHANNELS,
                )
                # fmt: on
                return
            block -= BLOCKS[i]


@triton.jit
def write_codes(
    side,
    token,
    at_group,
    before,
    used,
    new_tokens,
    slots,
    groups,
    capacity,
    LAYOUT: tl.constexpr,
    KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of one token that leaves the tail, if there are so many and its slot exists."""
    stream = side.stream
    WIDTH: tl.constexpr = HEAD_DIM * PER
    held, start, origin = places(before, used)
    slot = start + token - origin
    if token < held + new_tokens - slots - start:
        if (slot >= 0) & (slot < capacity):
            b, group = at_group // groups, at_group % groups
            codes = stream.codes + b * stream.code_batch + group * stream.code_group + slot * stream.code_token
            row = at_group * new_tokens + token
            if KEPT:
                for first in range(0, WIDTH, BLOCK):
                    channel = first + tl.arange(0, BLOCK)
                    if before is None:
                        # nothing enters a tail, so the token is where it came from
                        head = group * PER + channel // HEAD_DIM
                        at = side.new.pointer + b * side.new.batch + token * side.new.token
                        at += head * side.new.head + (channel % HEAD_DIM) * side.new.channel
                        x = tl.load(at, mask=channel < WIDTH, other=0.0)
                    else:
                        x = tl.load(
                            stream.coefficients + stream.at + row * WIDTH + channel, mask=channel < WIDTH, other=0.0
                        )
                    tl.store(codes + channel, x.to(stream.codes.dtype.element_ty), mask=channel < WIDTH)
            else:
                rank: tl.constexpr = component_count(LAYOUT)
                coefficients = stream.coefficients + stream.at + row * rank
                step = stream.step + (b * stream.next_batch + group) * rank
                if stream.scales is not None:
                    scale = token_scale(coefficients, step, LAYOUT, BLOCK)
                    at = b * stream.scale_batch + group * stream.scale_group + slot * stream.scale_token
                    tl.store(stream.scales + at, scale)
                    quantize_token(coefficients, step, scale, codes, LAYOUT, BLOCK)
                else:
                    quantize_token(coefficients, step, None, codes, LAYOUT, BLOCK)


@triton.jit
def enter_tail(side, at_head, before, new_tokens, slots, heads, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Put the newest tokens of one head into their ring slots."""
    tail, new = side.tail, side.new
    held = tl.load(before)
    b, head = at_head // heads, at_head % heads
    channel = tl.arange(0, CHANNELS)
    for token in range(tl.maximum(new_tokens - slots, 0), new_tokens):
        at_new = new.pointer + b * new.batch + head * new.head + token * new.token + channel * new.channel
        x = tl.load(at_new, mask=channel < HEAD_DIM, other=0.0)
        slot = (held + token) % slots
        at_tail = tail.pointer + b * tail.batch + head * tail.head + slot * tail.token + channel * tail.channel
        tl.store(at_tail, x.to(tail.pointer.dtype.element_ty), mask=channel < HEAD_DIM)


@triton.jit(do_not_specialize=["capacity", "used"])
def write_kernel(
    sides,
    cursor,
    before,
    used,
    new_tokens,
    slots,
    heads,
    groups,
    capacity,
    tokens_coded,
    all_groups,
    all_heads,
    LAYOUTS: tl.constexpr,
    KEPT: tl.constexpr,
    DIMS: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Codes, tail and cursor. Grid: per token and group, then per head, then one for the cursor; keys and values."""
    work = tl.program_id(0)
    coded = tokens_coded * all_groups
    for i in tl.static_range(2):
        if tl.program_id(1) == i:
            if work < coded:
                if sides[i].stream.codes is not None:
                    # fmt: off
                    write_codes(
                        sides[i], work % tokens_coded, (work // tokens_coded).to(tl.int64), before, used, new_tokens, slots, groups,
                        capacity, entry(LAYOUTS, i), KEPT[i], DIMS[i], PER, BLOCK,
                    )
                    # fmt: on
            elif cursor is not None:
                if work < coded + all_heads:
                    at_head = (work - coded).to(tl.int64)
                    enter_tail(sides[i], at_head, before, new_tokens, slots, heads, DIMS[i], CHANNELS)
                elif i == 0:
                    held, start = tl.load(before), tl.load(before + 1)
                    tl.store(cursor, held + new_tokens)
                    tl.store(cursor + 1, tl.maximum(start, held + new_tokens - slots))
