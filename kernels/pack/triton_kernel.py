"""Triton kernel of `apack::pack`: what coding loses of a sample of tokens."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from apack_compile.kernels.attend.triton_arguments import entry
from apack_compile.kernels.triton_bands import (
    BAND_COUNT,
    component_count,
    first_byte,
    first_component,
    is_float,
    level_bits,
    per_unit,
    token_bytes,
    top_level,
    unit_bytes,
    units,
)
from apack_compile.kernels.triton_rotations import partner_of, rotated_back

ROWS, CHANNELS, UNITS = 16, 32, 16
SUM_ROWS, SUM_CHANNELS = 32, 128
# Of all squares, of squared errors, of tokens.
OTHER_SUMS = tl.constexpr(3)
TINY = tl.constexpr(1.1754943508222875e-38)


class Coded(NamedTuple):
    """Tokens `[B, H, n, D]` of one stream with their strides, their codes and token scales, and the basis.

    next_batch: groups from one sequence's basis to the next, 0 if all share one. A stream that is kept as it is has no codes here.
    """

    tokens: Tensor
    batch: int
    head: int
    token: int
    channel: int
    codes: Tensor | None = None
    scales: Tensor | None = None
    mean: Tensor | None = None
    decoder: Tensor | None = None
    step: Tensor | None = None
    next_batch: int = 0


@triton.jit
def decoded_tile(
    stream, at_codes, row_ok, at_basis, channel, width, LAYOUT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    """Channels `[rows, channels]` of what tokens' codes stand for, less the mean, at a token scale of 1."""
    rank: tl.constexpr = component_count(LAYOUT)
    found = tl.zeros((ROWS, channel.shape[0]), tl.float32)
    for band in tl.static_range(BAND_COUNT):
        for start in range(0, units(LAYOUT, band), UNITS):
            unit = start + tl.arange(0, UNITS)
            wanted = row_ok[:, None] & (unit < units(LAYOUT, band))[None, :]
            code = tl.zeros((ROWS, UNITS), tl.int32)
            for i in tl.static_range(unit_bytes(band)):
                at = first_byte(LAYOUT, band) + unit_bytes(band) * unit + i
                byte = tl.load(stream.codes + at_codes[:, None] + at[None, :], mask=wanted, other=0)
                code = code | (byte.to(tl.int32) << (8 * i))
            for place in tl.static_range(per_unit(band)):
                own = unit * per_unit(band) + place
                real = own < LAYOUT[band]
                component = at_basis * rank + first_component(LAYOUT, band) + own
                if is_float(band):
                    level = code.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                else:
                    bits = (code >> (place * level_bits(band))) & ((1 << level_bits(band)) - 1)
                    level = bits.to(tl.float32) - top_level(band) / 2
                step = tl.load(stream.step + component, mask=real, other=0.0)
                at_decoder = stream.decoder + component[:, None] * width + channel[None, :]
                rows = tl.load(at_decoder, mask=real[:, None] & (channel < width)[None, :], other=0.0)
                found = tl.dot(level * step[None, :], rows.to(tl.float32), found, input_precision="ieee")
    return found


@triton.jit
def lost_of(
    stream, rotations, anchors, real, used, every, samples, tokens, slots, groups, sums, widest,
    LAYOUT: tl.constexpr, HEAD_DIM: tl.constexpr, PER: tl.constexpr, PAIRS: tl.constexpr, ANCHOR_SLOTS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of one stream's sample: of each channel less the mean, rotated back, of all squares, of squared errors, of tokens."""
    at_group = tl.program_id(1).to(tl.int64)
    b, group = at_group // groups, at_group % groups
    sample = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = sample * every
    row_ok = sample < samples
    if real is not None:
        row_ok = row_ok & (tl.load(real + b * tokens + token, mask=row_ok, other=0) != 0)
    at_slot = at_group * slots + used + token
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if stream.scales is not None:
        scale = tl.load(stream.scales + at_slot, mask=row_ok, other=0.0).to(tl.float32)
    width: tl.constexpr = HEAD_DIM * PER
    at_basis = b * stream.next_batch + group
    at_turn = (b * anchors + (used + token) // ANCHOR_SLOTS) * 2 * PAIRS if PAIRS > 0 else token
    error, square = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    at_out = sums + (tl.program_id(0) * tl.num_programs(1) + at_group) * (widest + OTHER_SUMS)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        wanted = row_ok[:, None] & (channel < width)[None, :]
        of_head = channel % HEAD_DIM
        head = group * PER + channel // HEAD_DIM
        at = stream.tokens + (b * stream.batch + token * stream.token)[:, None]
        x = tl.load(at + (head * stream.head + of_head * stream.channel)[None, :], mask=wanted, other=0.0).to(
            tl.float32
        )
        if PAIRS > 0:
            other = partner_of(of_head, PAIRS)
            partner = tl.load(at + (head * stream.head + other * stream.channel)[None, :], mask=wanted, other=0.0)
            x = rotated_back(x, partner.to(tl.float32), rotations, at_turn, row_ok, of_head, PAIRS)
        mean = tl.load(stream.mean + at_basis * width + channel, mask=channel < width, other=0.0).to(tl.float32)
        x = tl.where(wanted, x - mean[None, :], 0.0)
        at_codes = at_slot * token_bytes(LAYOUT)
        decoded = decoded_tile(stream, at_codes, row_ok, at_basis, channel, width, LAYOUT, ROWS, UNITS)
        miss = tl.where(wanted, x - decoded * scale[:, None], 0.0)
        error += tl.sum(miss * miss, 1)
        square += tl.sum(x * x, 1)
        tl.store(at_out + channel, tl.sum(x, 0), mask=channel < width)
    at_out += widest
    tl.store(at_out, tl.sum(square))
    tl.store(at_out + 1, tl.sum(error))
    tl.store(at_out + 2, tl.sum(row_ok.to(tl.float32)))


@triton.jit(do_not_specialize=["anchors", "used", "every", "samples", "tokens", "slots"])
def lost_kernel(
    streams, rotations, anchors, real, used, every, samples, tokens, slots, groups, sums, of_stream, widest,
    LAYOUTS: tl.constexpr, CODED: tl.constexpr, DIMS: tl.constexpr, PER: tl.constexpr, PAIRS: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Sums `[2, tiles, B G, widest + 3]` of K and V. Grid: tiles of samples; batch and groups; keys, values."""
    for i in tl.static_range(2):
        if CODED[i]:
            if tl.program_id(2) == i:
                # fmt: off
                lost_of(
                    streams[i], rotations, anchors, real, used, every, samples, tokens, slots, groups, sums + i * of_stream, widest,
                    entry(LAYOUTS, i), DIMS[i], PER, PAIRS[i], ANCHOR_SLOTS, ROWS, CHANNELS, UNITS,
                )
                # fmt: on


@triton.jit(do_not_specialize=["tiles"])
def share_kernel(
    sums, lost, tiles, batch, groups, of_stream, widest,
    CODED: tl.constexpr, WIDTHS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Shares `[2]` of the variance of K and V that are lost, 0 for what is not coded. Grid: keys, values."""
    for i in tl.static_range(2):
        if tl.program_id(0) == i:
            share = 0.0
            if CODED[i]:
                rows, size = tiles * batch, widest + OTHER_SUMS
                own = sums + i * of_stream
                of_means, square, error, count = 0.0, 0.0, 0.0, 0.0
                for group in range(groups):
                    for first in range(0, WIDTHS[i], SUM_CHANNELS):
                        channel = first + tl.arange(0, SUM_CHANNELS)
                        found = tl.zeros((SUM_CHANNELS,), tl.float32)
                        for start in range(0, rows, SUM_ROWS):
                            row = start + tl.arange(0, SUM_ROWS)
                            at = own + (row * groups + group)[:, None].to(tl.int64) * size + channel[None, :]
                            wanted = (row < rows)[:, None] & (channel < WIDTHS[i])[None, :]
                            found += tl.sum(tl.load(at, mask=wanted, other=0.0), 0)
                        of_means += tl.sum(found * found)
                    for start in range(0, rows, SUM_ROWS):
                        row = start + tl.arange(0, SUM_ROWS)
                        at = own + (row * groups + group).to(tl.int64) * size + widest
                        square += tl.sum(tl.load(at, mask=row < rows, other=0.0))
                        error += tl.sum(tl.load(at + 1, mask=row < rows, other=0.0))
                        count += tl.sum(tl.load(at + 2, mask=row < rows, other=0.0))
                # every group counts the same tokens
                share = error / tl.maximum(square - of_means / tl.maximum(count / groups, 1.0), TINY)
            tl.store(lost + i, share)
