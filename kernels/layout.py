"""From the operations' flat tensor lists to segments, and which of their slots hold a token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apack_compile.kernels.format import Bands, StreamBasis

# cursor[HELD]: tokens held; cursor[PACKED]: first position of the tail; position p packs into text slot p - cursor[ORIGIN].
HELD, PACKED, ORIGIN = 0, 1, 2
# Segments of a cache with tiers, by their place among the positions. Text is the last one of every cache.
VISION, TEXT = 1, 2
PACKED_SEGMENTS = (1, 2, 3)


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
    def as_is(self) -> bool:
        """Whether tokens are kept untransformed, in the model's dtype."""
        return self.codes.dtype != torch.uint8


def check_segments(
    codes: Sequence[Tensor],
    bases: Sequence[Tensor],
    bands: Sequence[int],
    positions: Sequence[Tensor],
    turns: Sequence[Tensor] = (),
    tiers: Tensor | None = None,
) -> None:
    """Raise ValueError where the flat lists are not those of one to three packed segments; tiers: of vision and text only."""
    segments = len(positions) - 1
    if segments not in PACKED_SEGMENTS or (tiers is not None and segments != TEXT):
        allowed = "3, of first, vision and text" if tiers is not None else "2 to 4, of first and the packed segments"
        raise ValueError(f"positions: {len(positions)} tensors must be {allowed}")
    for name, given, each in (("codes", codes, 4), ("bases", bases, 6), ("bands", bands, 8)):
        if len(given) != each * segments:
            raise ValueError(f"{name}: {len(given)} entries must be {each} for each of {segments} packed segments")
    if len(turns) not in (0, segments):
        raise ValueError(f"turns: {len(turns)} entries must be one for each of {segments} packed segments, or none")


def filled_segments(codes: Sequence[Tensor]) -> list[int]:
    """Packed segments that have slots, and text, which gets more of them."""
    count = len(codes) // 4
    return [i for i in range(count) if i == count - 1 or codes[4 * i].shape[2] > 0]


def of_segments(entries: Sequence[Any], segments: Sequence[int], each: int, leading: int = 0) -> list:
    """The leading entries of a flat list, and the `each` entries of every one of these packed segments."""
    starts = [leading + each * segment for segment in segments]
    return [*entries[:leading], *(entry for start in starts for entry in entries[start : start + each])]


def packed_streams(codes: Sequence[Tensor], bases: Sequence[Tensor], bands: Sequence[int]) -> list[PackedStream]:
    """The streams of the flat lists: two, three and four entries each."""
    return [
        PackedStream(codes[2 * i], codes[2 * i + 1], StreamBasis(*bases[3 * i : 3 * i + 3]), bands_at(bands, i))
        for i in range(len(codes) // 2)
    ]


def bands_at(bands: Sequence[int], stream: int) -> Bands:
    """Bands of one stream of a flat list."""
    n16, n8, n4, n2 = bands[4 * stream : 4 * stream + 4]
    return Bands((n16, n8, n4, n2))


def to_groups(x: Tensor, groups: int) -> Tensor:
    """Heads `[B, H, N, D]` as head groups `[B, G, N, W_g]`."""
    batch, heads, tokens, head_dim = x.shape
    x = x.reshape(batch, groups, heads // groups, tokens, head_dim)
    return x.transpose(2, 3).reshape(batch, groups, tokens, heads // groups * head_dim)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """Head groups `[B, G, N, W_g]` as heads `[B, H, N, D]`."""
    batch, groups, tokens, width = x.shape
    head_dim = width * groups // heads
    x = x.reshape(batch, groups, tokens, heads // groups, head_dim)
    return x.transpose(2, 3).reshape(batch, heads, tokens, head_dim)


def stored_before(position: Tensor, cursor: Tensor, new_tokens: int) -> Tensor:
    """Which slots `[B, N]` hold a token that came before the `new_tokens` newest, by their positions."""
    end = torch.minimum(cursor[PACKED], cursor[HELD] - new_tokens)
    return (position >= 0) & (position < end)


def tail_positions(slots: int, cursor: Tensor) -> Tensor:
    """Position `[slots]` that each slot of the tail ring would hold; at or past `cursor[HELD]` it is empty."""
    start = cursor[PACKED]
    return start + (torch.arange(slots, device=cursor.device) - start) % max(slots, 1)
