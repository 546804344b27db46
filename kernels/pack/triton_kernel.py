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
    stream, rotations, anchors, real, used, every, samples, tokens, slots, groups, errors, centered, widest,
    LAYOUT: tl.constexpr, HEAD_DIM: tl.constexpr, PER: tl.constexpr, PAIRS: tl.constexpr, ANCHOR_SLOTS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Squared errors of a tile of one stream's sample, and its tokens less the mean, rotated back; zeros for tokens that do not count."""
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
    error = tl.zeros((ROWS,), tl.float32)
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
        at_out = centered + (at_group * samples + sample)[:, None] * widest + channel[None, :]
        tl.store(at_out, x, mask=(sample < samples)[:, None] & (channel < width)[None, :])
    tl.store(errors + at_group * samples + sample, error, mask=sample < samples)


@triton.jit(do_not_specialize=["anchors", "used", "every", "samples", "tokens", "slots"])
def lost_kernel(
    streams, rotations, anchors, real, used, every, samples, tokens, slots, groups, errors, centered, all_rows, widest,
    LAYOUTS: tl.constexpr, CODED: tl.constexpr, DIMS: tl.constexpr, PER: tl.constexpr, PAIRS: tl.constexpr,
    ANCHOR_SLOTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Errors `[2, B G S]` and centered tokens `[2, B G S, widest]` of K and V. Grid: tiles of samples; batch and groups; keys, values."""
    for i in tl.static_range(2):
        if CODED[i]:
            if tl.program_id(2) == i:
                # fmt: off
                lost_of(
                    streams[i], rotations, anchors, real, used, every, samples, tokens, slots, groups, errors + i * all_rows,
                    centered + i * all_rows * widest, widest, entry(LAYOUTS, i), DIMS[i], PER, PAIRS[i], ANCHOR_SLOTS, ROWS,
                    CHANNELS, UNITS,
                )
                # fmt: on
