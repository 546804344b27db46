"""What the attend kernels are given, in bundles.

A *unit* is what shares one copy of the tokens: a head group where they are packed, a KV head where they are dense. Row r of
`[B, H_q * rows]` is row `r % rows` of query head `r // rows`; a unit's rows are contiguous.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from apack_compile.kernels.state import PackedStream


class Strided(NamedTuple):
    """Dense tokens `[B, H, N, D]`; head h is `h % per` of group `h // per`."""

    pointer: Tensor
    batch: int
    group: int
    head: int
    token: int
    channel: int
    per: int


class Latent(NamedTuple):
    """Latents of an output `[B, rows, columns]`, with its share `[B, rows]` of the softmax as scale.

    Of a query: `[B, anchors, all rows, columns]`, with scale and shift `[B, anchors, all rows]`. Where keys are not relative there is one
    anchor, by which nothing is rotated. offset: what the levels' offset adds to scores, of each block of columns,
    `[B, anchors, blocks, all rows]`; None in float32, where levels have no offset.
    """

    latent: Tensor
    scale: Tensor | None
    shift: Tensor | None = None
    offset: Tensor | None = None


class Segment(NamedTuple):
    """A segment's tokens. Packed: codes and token scales; dense: `Strided` keys and values. positions: `[B, slots]` or None.

    query: a packed segment's query latents. part: where its outputs go, `[B, splits, rows, columns]`. read: the tier counts `[B, 2]` of
    the vision segment. next_batch: 1, or 0 where all sequences share its tokens and positions.
    """

    key: Tensor | Strided
    value: Tensor | Strided
    positions: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    query: Latent | None = None
    part: Tensor | None = None
    read: Tensor | None = None
    next_batch: int = 1


class Rows(NamedTuple):
    """Query rows `[B, H_q, rows, D]`."""

    pointer: Tensor
    batch: int
    head: int
    row: int
    channel: int


class Masks(NamedTuple):
    """Mask (uint8 or float) with strides of batch, head, row and token, and its columns."""

    mask: Tensor | None
    batch: int
    head: int
    row: int
    token: int
    columns: int


class Share(NamedTuple):
    """A segment's part of the work and of the results, put together in the kernel: what grows with the cache is no constant of it.

    splits, row tiles, blocks a split, slots; its first split among all and their number; its first split and the number of splits in
    the tensor of its outputs; its first slot among the kept scores and their number; anchors in its query latents.
    """

    splits: int
    row_tiles: int
    blocks: int
    slots: int
    first_split: int
    all_splits: int
    first_part: int
    parts: int
    first_slot: int
    all_slots: int
    anchors: int


class Sizes(NamedTuple):
    """Rows of a sequence, of a query head, of a group and of a KV head; groups, KV heads, first slots, new tokens."""

    all_rows: int
    head_rows: int
    group_rows: int
    kv_rows: int
    groups: int
    kv_heads: int
    first_slots: int
    new_tokens: int


class Results(NamedTuple):
    """Log-sum-exp `[B, splits, rows]`, outputs over dense tokens `[B, dense splits, rows, D]`; scores `[B, slots, rows]` or None."""

    lse: Tensor
    dense: Tensor
    scores: Tensor | None


class Basis(NamedTuple):
    """Mean, decoder and step of one stream; `next_batch` is the groups from one sequence's basis to the next, 0 if all share one."""

    mean: Tensor
    decoder: Tensor
    step: Tensor
    next_batch: int


class Transform(NamedTuple):
    """A packed segment's latents, and the basis that queries come from or outputs go through.

    rotations: of its relative keys; next_batch: 1, or 0 where all sequences share them.
    """

    latent: Latent
    basis: Basis
    rotations: Tensor | None = None
    next_batch: int = 1


class Splits(NamedTuple):
    """One segment's splits `[B, splits, rows, columns]`, blocks of their columns, and where their sum goes."""

    part: Tensor
    columns: int
    blocks: int
    out: Latent


@triton.constexpr_function
def entry(values, number):
    """An entry of a constant tuple. What Triton 3.6 gives by an index is no constant where it is a tuple itself."""
    return values[number]


def next_batch(x: Tensor) -> int:
    """Rows from one sequence's to the next: 0 of what all of them share."""
    return int(len(x) > 1)


def strided(x: Tensor) -> Strided:
    """Dense tokens `[B, H, N, D]` for the kernel."""
    _, head, token, channel = x.stride()
    return Strided(x, next_batch(x) * x.stride(0), head, 0, token, channel, 1)


def kept_as_is(stream: PackedStream, heads: int) -> Strided:
    """A stream kept as it is, `[B, G, N, W_g]`, as dense tokens for the kernel."""
    codes, per = stream.codes, heads // stream.groups
    _, group, token, channel = codes.stride()
    batch = next_batch(codes) * codes.stride(0)
    return Strided(codes, batch, group, codes.shape[3] // per * channel, token, channel, per)


def basis_of(stream: PackedStream) -> Basis:
    """A stream's basis for the kernels."""
    mean, decoder, step = (tensor.contiguous() for tensor in stream.basis)
    return Basis(mean, decoder, step, 0 if mean.shape[0] == 1 else stream.groups)


def codes_of(stream: PackedStream) -> Tensor:
    """A stream's codes for the kernel: as 16-bit words where every token starts at an even address."""
    codes = stream.codes.contiguous()
    even = stream.bands.token_bytes % 2 == 0 and codes.data_ptr() % 2 == 0 and codes.numel() > 0
    return codes.view(torch.int16) if even else codes


def masks_of(mask: Tensor | None) -> Masks:
    """A mask for the kernel; where an extent is 1, its stride is 0."""
    masked: tuple = (None, 0, 0, 0, 0, 0)
    if mask is not None:
        strides = [0 if extent == 1 else stride for extent, stride in zip(mask.shape[:3], mask.stride(), strict=False)]
        given = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        masked = (given, *strides, mask.stride(3), mask.shape[3])
    return Masks(*masked)


def alignment(dense: Sequence[Strided]) -> int:
    """Largest power of two, at most 16, that divides every stride but the channels'."""
    return math.gcd(16, *(stride for x in dense for stride in (x.batch, x.group, x.head, x.token)))
