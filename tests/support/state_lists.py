"""States of the operations from lists by what they hold, as tests write them down; operations that are given such lists."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.kernels.state import COARSE, TEXT, VISION, DenseSegment, PackedState, PackedStream, Segment


def streams_of(codes: Sequence, bases: Sequence, bands: Sequence[int]) -> list[PackedStream]:
    """Keys and values of packed segments: codes and token scale, mean, decoder and step, bands of each."""
    each = zip(
        codes[::2], codes[1::2], zip(*[iter(bases)] * 3, strict=True), zip(*[iter(bands)] * 4, strict=True), strict=True
    )
    return [PackedStream(stored, scale, StreamBasis(*basis), Bands(counts)) for stored, scale, basis, counts in each]


def state_of(
    dense: Sequence,
    codes: Sequence,
    bases: Sequence,
    bands: Sequence[int],
    positions: Sequence,
    cursor: Any,
    rotations: Sequence | None = None,
    block: int = 0,
    interleaved_pairs: int = 0,
) -> PackedState:
    """dense: keys and values of first and of the tail; positions: of first and of each packed segment."""
    streams = streams_of(codes, bases, bands)
    pairs = list(zip(streams[::2], streams[1::2], strict=True))
    kinds = (COARSE, VISION, TEXT)[-len(pairs) :]
    rotated = rotations or [None] * len(pairs)
    segments = [
        Segment(kind, *pair, p, by) for kind, pair, p, by in zip(kinds, pairs, positions[1:], rotated, strict=True)
    ]
    first, tail = DenseSegment(dense[0], dense[1]), DenseSegment(dense[2], dense[3])
    return PackedState(tuple(segments), first, positions[0], tail, cursor, block if rotations else 0, interleaved_pairs)


def append_lists(
    stores: Sequence, bases: Sequence, bands: Sequence[int], cursor: Any, text_rotations: Any = None, block: int = 0
) -> tuple[list, list, list[int]]:
    """Arguments of append; stores: keys and values of the tail, codes and token scales of the text."""
    dense, rotations = [None, None, *stores[:2]], None if text_rotations is None else [text_rotations]
    return state_of(dense, stores[2:], bases, bands, [None, None], cursor, rotations, block).flatten().to_append()


def attend_with(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend`, or `attend_tiers`, that is given such lists."""

    def attend(
        query, key, value, mask, dense, codes, bases, bands, positions, cursor, scale, *tiers, **rotations
    ) -> Tensor:
        state = state_of(dense, codes, bases, bands, positions, cursor, **rotations)
        return function(query, key, value, mask, *state.flatten(), scale, *tiers)

    return attend


def unpack_with(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`unpack` that is given such lists."""

    def unpack(key, value, dense, codes, bases, bands, positions, cursor, tokens, **rotations) -> tuple[Tensor, Tensor]:
        return function(
            key, value, *state_of(dense, codes, bases, bands, positions, cursor, **rotations).flatten(), tokens
        )

    return unpack


def append_with(function: Callable[..., None]) -> Callable[..., None]:
    """`append` that is given such lists."""

    def append(key, value, stores, bases, bands, cursor, **rotations) -> None:
        function(key, value, *append_lists(stores, bases, bands, cursor, **rotations))

    return append
