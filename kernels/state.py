"""A layer's packed state by name, and as the flat lists that the operations are given (docs/format.md, "State").

No other file knows the order of these lists.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from apack_compile.kernels.format import BANDS, Bands, StreamBasis

LAYOUT_VERSION = 1
# Kinds of packed segments, in the order in which a state has them; text is the last one of every state.
COARSE, VISION, TEXT = 0, 1, 2
KIND_NAMES = ("coarse", "vision", "text")
# Packed segments that the operations have room for: those of a prefix, then those of its branches.
MAX_SEGMENTS = 5

# Integers of a layout before those of its segments, and of a segment: its kind, bands of key and value.
HEAD, SEGMENT = 3, 1 + 2 * len(BANDS)
# Tensors of a state before those of its segments, and of a segment without rotations.
CURSOR, TAIL_KEY, TAIL_VALUE, FIRST_TENSORS, SEGMENT_TENSORS = 0, 4, 5, 6, 11


@dataclass(frozen=True)
class PackedStream:
    """One stream of a packed segment: codes `[B, G, N, bytes]`, token scale `[B, G, N]` or empty, basis and bands."""

    codes: Tensor
    scale: Tensor
    basis: StreamBasis
    bands: Bands

    @property
    def groups(self) -> int:
        """Head groups."""
        return self.codes.shape[1]

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Codes and token scales."""
        return self.codes, self.scale

    @property
    def as_is(self) -> bool:
        """Whether tokens are kept untransformed, in the model's dtype."""
        return self.codes.dtype != torch.uint8

    def with_tokens(self, change: Callable[[Tensor], Tensor]) -> "PackedStream":
        """The same stream with codes and, where there are some, token scales changed."""
        scale = change(self.scale) if self.scale.dim() > 1 else self.scale
        return replace(self, codes=change(self.codes), scale=scale)


@dataclass(frozen=True)
class Segment:
    """Packed tokens of one kind; positions: int32 `[B, N]`, -1 for an empty slot.

    rotations: float32 `[B, blocks, 2, P]`, by which the keys of each block of slots were rotated back; None where they are not.
    A segment whose own batch is 1 is shared by all sequences.
    """

    kind: int
    key: PackedStream
    value: PackedStream
    positions: Tensor
    rotations: Tensor | None = None

    @property
    def slots(self) -> int:
        """Slots, empty ones included."""
        return self.key.codes.shape[2]

    @property
    def streams(self) -> tuple[PackedStream, PackedStream]:
        """Key, then value."""
        return self.key, self.value


@dataclass(frozen=True)
class DenseSegment:
    """Tokens as they are, `[B, H_kv, slots, D]` each."""

    key: Tensor
    value: Tensor

    @property
    def slots(self) -> int:
        """Slots, empty ones included."""
        return self.key.shape[2]


@dataclass(frozen=True)
class Layout:
    """What the tensors of a state do not say: kinds of the packed segments, bands of their keys and values.

    Kinds are in order, text last; those of a prefix come before those of its branches, in an order of their own.

    block: slots that share a rotation, 0 where keys are not rotated back. interleaved_pairs: 0, or the P of keys that the model
    has with pairs 2 i and 2 i + 1.
    """

    kinds: tuple[int, ...]
    bands: tuple[tuple[Bands, Bands], ...]
    block: int = 0
    interleaved_pairs: int = 0

    def flatten(self) -> list[int]:
        """As the operations are given it."""
        return layout_words(self.block, self.interleaved_pairs, zip(self.kinds, self.bands, strict=True))

    @classmethod
    def parse(cls, words: Sequence[int]) -> "Layout":
        """The layout of `flatten`; raises ValueError for another version and for what is no layout."""
        check_version(words)
        count, rest = divmod(len(words) - HEAD, SEGMENT)
        if rest or not 1 <= count <= MAX_SEGMENTS:
            allowed = [HEAD + SEGMENT * n for n in range(1, MAX_SEGMENTS + 1)]
            raise ValueError(
                f"layout: {len(words)} integers must be one of {allowed}, for one to {MAX_SEGMENTS} packed segments"
            )
        parts = [words[start : start + SEGMENT] for start in range(HEAD, len(words), SEGMENT)]
        kinds = tuple(part[0] for part in parts)
        if not set(kinds) <= {COARSE, VISION, TEXT} or own_segments_from(kinds) is None or kinds[-1] != TEXT:
            raise ValueError(
                f"layout: kinds {kinds} must be some of 0 (coarse), 1 (vision) and 2 (text), in order, with text; those of a prefix "
                "may come before them"
            )
        half = 1 + len(BANDS)
        bands = tuple((Bands(tuple(part[1:half])), Bands(tuple(part[half:]))) for part in parts)
        return cls(kinds, bands, words[1], words[2])

    def tensor_names(self) -> list[str]:
        """A name for each tensor of a state of this layout, in order."""
        names = ["cursor", "first_key", "first_value", "first_positions", "tail_key", "tail_value"]
        parts = [
            f"{stream}_{part}" for stream in ("key", "value") for part in ("codes", "scale", "mean", "decoder", "step")
        ]
        parts += ["positions", *(["rotations"] if self.block else [])]
        own = own_segments_from(self.kinds) or 0
        segments = [f"{'prefix_' if i < own else ''}{KIND_NAMES[kind]}" for i, kind in enumerate(self.kinds)]
        return names + [f"{segment}_{part}" for segment in segments for part in parts]


class FlatState(NamedTuple):
    """`state` and `layout` as the operations are given them: the tensors of a layer in order, and what those do not say."""

    tensors: list[Tensor]
    layout: list[int]

    def to_append(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """`stores`, `bases` and `layout` of append: what it writes, what it reads, and the layout of the text segment."""
        tensors, layout = self
        is_rotated = layout[1] > 0
        text = tensors[-SEGMENT_TENSORS - is_rotated :]
        stores = [tensors[CURSOR], tensors[TAIL_KEY], tensors[TAIL_VALUE], *text[:2], *text[5:7]]
        bases = [*text[2:5], *text[7:10], *text[SEGMENT_TENSORS:]]
        return stores, bases, [*layout[:HEAD], *layout[-SEGMENT:]]


@dataclass(frozen=True)
class PackedState:
    """The state of one layer. first_positions: int32 `[B, slots]`; cursor: int64 `[3]` (kernels/cursor.py)."""

    segments: tuple[Segment, ...]
    first: DenseSegment
    first_positions: Tensor
    tail: DenseSegment
    cursor: Tensor
    block: int = 0
    interleaved_pairs: int = 0

    @property
    def text(self) -> Segment:
        """The segment that takes what leaves the tail."""
        return self.segments[-1]

    @property
    def layout(self) -> Layout:
        """What the tensors do not say."""
        kinds = tuple(segment.kind for segment in self.segments)
        bands = tuple((segment.key.bands, segment.value.bands) for segment in self.segments)
        return Layout(kinds, bands, self.block, self.interleaved_pairs)

    def flatten(self) -> FlatState:
        """As the operations are given it."""
        first, tail = self.first, self.tail
        state = [self.cursor, first.key, first.value, self.first_positions, tail.key, tail.value]
        for segment in self.segments:
            key, value = segment.key, segment.value
            state += [key.codes, key.scale, *key.basis, value.codes, value.scale, *value.basis, segment.positions]
            if segment.rotations is not None:
                state.append(segment.rotations)
        segments = [(segment.kind, (segment.key.bands, segment.value.bands)) for segment in self.segments]
        return FlatState(state, layout_words(self.block, self.interleaved_pairs, segments))

    @classmethod
    def parse(cls, state: Sequence[Tensor] | None, layout: Sequence[int]) -> "PackedState":
        """The state of `flatten`; raises ValueError for lists that are not of one."""
        found = Layout.parse(layout)
        state, each = state or (), SEGMENT_TENSORS + (found.block > 0)
        wanted = FIRST_TENSORS + each * len(found.kinds)
        if len(state) != wanted:
            raise ValueError(
                f"state: {len(state)} tensors must be {wanted}: {FIRST_TENSORS}, and {each} for each of {len(found.kinds)} packed segments"
            )
        cursor, first_key, first_value, positions, tail_key, tail_value = state[:FIRST_TENSORS]
        segments = []
        for i, (kind, (key_bands, value_bands)) in enumerate(zip(found.kinds, found.bands, strict=True)):
            part = state[FIRST_TENSORS + each * i : FIRST_TENSORS + each * (i + 1)]
            key = PackedStream(part[0], part[1], StreamBasis(*part[2:5]), key_bands)
            value = PackedStream(part[5], part[6], StreamBasis(*part[7:10]), value_bands)
            segments.append(Segment(kind, key, value, part[10], part[11] if found.block else None))
        first, tail = DenseSegment(first_key, first_value), DenseSegment(tail_key, tail_value)
        return cls(tuple(segments), first, positions, tail, cursor, found.block, found.interleaved_pairs)


@dataclass(frozen=True)
class AppendState:
    """What append is given: the tail, and the text streams that take what leaves it."""

    cursor: Tensor
    tail: DenseSegment
    key: PackedStream
    value: PackedStream
    rotations: Tensor | None
    block: int

    @classmethod
    def parse(cls, stores: Sequence[Tensor], bases: Sequence[Tensor], layout: Sequence[int]) -> "AppendState":
        """The state of `FlatState.to_append`; raises ValueError for lists that are not of one."""
        found = Layout.parse(layout)
        if found.kinds != (TEXT,):
            raise ValueError(f"layout: kinds {found.kinds} must be (2,), text alone")
        for name, given, wanted in (("stores", stores, 7), ("bases", bases, 6 + (found.block > 0))):
            if len(given) != wanted:
                raise ValueError(f"{name}: {len(given)} tensors must be {wanted}")
        ((key_bands, value_bands),) = found.bands
        key = PackedStream(stores[3], stores[4], StreamBasis(*bases[:3]), key_bands)
        value = PackedStream(stores[5], stores[6], StreamBasis(*bases[3:6]), value_bands)
        tail, rotations = DenseSegment(stores[1], stores[2]), bases[6] if found.block else None
        return cls(stores[CURSOR], tail, key, value, rotations, found.block)


def layout_words(block: int, interleaved_pairs: int, segments: Iterable[tuple[int, tuple[Bands, Bands]]]) -> list[int]:
    """A layout as the operations are given it; segments: kind and bands of each."""
    words = [LAYOUT_VERSION, block, interleaved_pairs]
    for kind, (key, value) in segments:
        words += [kind, *key.counts, *value.counts]
    return words


def own_segments_from(kinds: Sequence[int]) -> int | None:
    """Where kinds begin anew behind those of a prefix; 0 where they do not, None where they do so more than once."""
    falls = [i for i in range(1, len(kinds)) if kinds[i] <= kinds[i - 1]]
    return None if len(falls) > 1 else sum(falls)


def check_version(layout: Sequence[int]) -> None:
    """Raise ValueError for a layout that this version does not read."""
    if not layout:
        raise ValueError(
            "layout: missing: the program was saved by an apack-compile 0.1.0 whose state had none yet, version 0 of it; make it anew "
            f"with optimize, from the program that it was made of (this apack-compile reads version {LAYOUT_VERSION})"
        )
    if layout[0] != LAYOUT_VERSION:
        raise ValueError(
            f"layout: version {layout[0]} must be {LAYOUT_VERSION}, which this apack-compile reads; make the program anew with optimize, "
            "from the program that it was made of, or install the apack-compile that saved it"
        )


def check_tiers(
    kinds: Sequence[int],
    slots: Sequence[int],
    batch: int,
    vision_importance: Tensor | None,
    text_importance: Tensor | None,
) -> None:
    """Raise ValueError for packed segments that cannot have tiers, and for importance that is not `[B, slots]` of its segment."""
    if tuple(kinds) != (VISION, TEXT):
        named = ", ".join(KIND_NAMES[kind] for kind in kinds)
        raise ValueError(f"layout: packed segments {named} must be vision and text, which have tiers")
    for kind, known, count in zip(KIND_NAMES[VISION:], (vision_importance, text_importance), slots, strict=True):
        if known is not None and known.numel() and known.shape != (batch, count):
            raise ValueError(
                f"{kind}_importance: shape {tuple(known.shape)} must be {(batch, count)}, that of the slots"
            )
