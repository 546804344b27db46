"""A layer's tensors as the structures of kernels/csrc/arguments.h, for the compiled operations.

A layer's tensors stay the same for many steps, so what was found of them is kept with its cursor as long as they are the very same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from apack_compile.kernels.format import BANDS
from apack_compile.kernels.native import DTYPES
from apack_compile.kernels.state import (
    CURSOR,
    MAX_SEGMENTS,
    AppendState,
    DenseSegment,
    PackedState,
    PackedStream,
    check_version,
)
from apack_compile.kernels.structs import SEGMENT

# the last words of a Source whose tokens are kept as they are
NO_BASIS = (0,) * (6 + len(BANDS))
NO_ROTATION = (0, 0, 0, 0, 0)
NO_SEGMENT = SEGMENT.pack(*((0, 0, 0) + ((0,) * 5 + (1,) + NO_BASIS) * 2))


class Kept:
    """What was found of some tensors, which it holds on to, so that their addresses are theirs as long as it matches.

    A copy of it forgets them: it lives on a cursor.
    """

    __slots__ = ("found", "layout", "tensors")

    def __init__(self, tensors: Sequence[Tensor] = (), layout: Sequence[int] = (), found: object = None) -> None:
        self.tensors, self.layout, self.found = list(tensors), list(layout), found

    def matches(self, tensors: Sequence[Tensor], layout: Sequence[int]) -> bool:
        """Whether these are the very tensors."""
        kept = self.tensors
        return len(kept) == len(tensors) and all(map(is_, kept, tensors)) and self.layout == layout

    def __deepcopy__(self, memo: dict) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple:
        return Kept, ()


@dataclass(frozen=True)
class Addresses:
    """A state for the compiled operations: `State` of arguments.h, words of `Rotations` for each packed segment.

    rotates_as_is: whether keys that are kept as they are were rotated back, which no compiled operation reads. kinds, slots: of the
    packed segments. copies: what must live as long as this.
    """

    state: bytes
    rotations: tuple[int, ...]
    cursor: int
    interleaved_pairs: int
    rotates_as_is: bool
    kinds: tuple[int, ...]
    slots: tuple[int, ...]
    copies: tuple[Tensor, ...]


@dataclass(frozen=True)
class AppendAddresses:
    """What append is given: words of tail and text stream of K and of V, those of `Rotations`, slots of the tail and of text."""

    key: tuple[int, ...]
    value: tuple[int, ...]
    rotations: tuple[int, ...]
    cursor: int
    tail_slots: int
    capacity: int


def addresses_of(state: list[Tensor] | None, layout: Sequence[int]) -> Addresses:
    """The state's addresses; raises ValueError for lists that are no state (kernels/state.py)."""
    check_version(layout)
    if not state:
        raise ValueError("state: no tensors")
    cursor = state[CURSOR]
    kept = getattr(cursor, "_apack_state", None)
    if kept is not None and kept.matches(state, layout):
        return kept.found
    parsed, copies = PackedState.parse(state, layout), list[Tensor]()
    segments = [_dense_segment(parsed.first, parsed.first_positions, copies)]
    rotations: list[int] = []
    for segment in parsed.segments:
        key, value = _packed_source(segment.key, copies), _packed_source(segment.value, copies)
        positions = _plain(segment.positions, copies)
        segments.append(SEGMENT.pack(segment.slots, len(positions), positions.data_ptr(), *key, *value))
        rotations += _rotation_words(segment.rotations, parsed.block, copies)
    missing = MAX_SEGMENTS - len(parsed.segments)
    segments += [*[NO_SEGMENT] * missing, _dense_segment(parsed.tail, None, copies)]
    rotates_as_is = parsed.block > 0 and any(segment.key.as_is for segment in parsed.segments)
    words = (*rotations, *NO_ROTATION * missing)
    pairs = parsed.interleaved_pairs
    kinds, slots = parsed.layout.kinds, tuple(segment.slots for segment in parsed.segments)
    found = Addresses(b"".join(segments), words, cursor.data_ptr(), pairs, rotates_as_is, kinds, slots, tuple(copies))
    if not copies:
        cursor._apack_state = Kept(state, layout, found)  # type: ignore[attr-defined]
    return found


def append_addresses_of(stores: list[Tensor], bases: list[Tensor], layout: Sequence[int]) -> AppendAddresses | None:
    """What append is given; None where the compiled operation cannot write into it. Raises ValueError for lists of other lengths."""
    check_version(layout)
    cursor, tensors = stores[CURSOR], (*stores, *bases)
    kept = getattr(cursor, "_apack_append", None)
    if kept is None or not kept.matches(tensors, layout):
        kept = Kept(tensors, layout, _append_addresses(AppendState.parse(stores, bases, layout), tensors))
        cursor._apack_append = kept  # type: ignore[attr-defined]
    return kept.found


def _append_addresses(state: AppendState, tensors: Sequence[Tensor]) -> AppendAddresses | None:
    stores = (state.tail.key, state.tail.value, state.key.codes, state.value.codes)
    copies: list[Tensor] = []
    rotations = _rotation_words(state.rotations, state.block, copies)
    if copies or not all(x.is_contiguous() for x in tensors) or any(x.dtype not in DTYPES for x in stores):
        return None
    key, value = (
        (tail.data_ptr(), DTYPES[tail.dtype], *tail.stride()[:3], *_packed_source(stream, copies))
        for tail, stream in ((state.tail.key, state.key), (state.tail.value, state.value))
    )
    slots = state.tail.slots, state.key.codes.shape[2]
    return AppendAddresses(key, value, rotations, state.cursor.data_ptr(), *slots)


def with_rows(x: Tensor) -> Tensor:
    """The same values with rows that are contiguous, in a dtype that the compiled operation reads."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x if x.dtype in DTYPES else x.float()


def _plain(x: Tensor, copies: list[Tensor]) -> Tensor:
    """A contiguous tensor; a copy is noted, because it must outlive the call and cannot serve another one."""
    if not x.is_contiguous():
        x = x.contiguous()
        copies.append(x)
    return x


def _rotation_words(rotations: Tensor | None, block: int, copies: list[Tensor]) -> tuple[int, ...]:
    """`Rotations` of arguments.h."""
    if rotations is None:
        return NO_ROTATION
    if rotations.dtype != torch.float32 or not rotations.is_contiguous():
        rotations = rotations.float().contiguous()
        copies.append(rotations)
    batch, blocks, _, pairs = rotations.shape
    return rotations.data_ptr(), batch, blocks, pairs, block


def _dense_segment(tokens: DenseSegment, positions: Tensor | None, copies: list[Tensor]) -> bytes:
    """`Segment` of heads as they are."""
    where = 0 if positions is None else _plain(positions, copies).data_ptr()
    sources = *_as_is_source(tokens.key, copies), *_as_is_source(tokens.value, copies)
    return SEGMENT.pack(tokens.slots, len(tokens.key), where, *sources)


def _as_is_source(x: Tensor, copies: list[Tensor]) -> tuple[int, ...]:
    """`Source` of tokens as they are: `[B, G, slots, W_g]`."""
    readable = with_rows(x)
    if readable is not x:
        copies.append(readable)
    return (readable.data_ptr(), DTYPES[readable.dtype], *_strides(readable), x.shape[1], *NO_BASIS)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, group and token; 0 of a batch that all sequences share."""
    batch, *others = x.stride()[:3]
    return 0 if len(x) == 1 else batch, *others


def _packed_source(stream: PackedStream, copies: list[Tensor]) -> tuple[int, ...]:
    """`Source` of a packed stream."""
    if stream.as_is:
        return _as_is_source(stream.codes, copies)
    mean, decoder, step = (_plain(x, copies) for x in stream.basis)
    codes = _plain(stream.codes, copies)
    scale = _plain(stream.scale, copies).data_ptr() if stream.scale.numel() else 0
    pointers = (mean.data_ptr(), decoder.data_ptr(), step.data_ptr())
    return (
        codes.data_ptr(), DTYPES[codes.dtype], *_strides(codes), codes.shape[1],
        scale, *pointers, DTYPES[mean.dtype], mean.shape[0], *stream.bands.counts,
    )  # fmt: skip
