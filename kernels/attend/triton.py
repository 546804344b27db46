"""`apack::attend` and `apack::attend_tiers` on CUDA, in Triton.

Four launches: queries into latents, one pass over all segments, the splits into one, latents into outputs. Where a segment's value
components need more registers than there are, further passes over the values follow the first, which leaves its scores. Importance comes
from those scores too. Nothing waits for the device, and shapes alone choose every launch: a decode step can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apack_compile.kernels.attend import reference
from apack_compile.kernels.attend.triton_arguments import (
    Latent,
    Results,
    Rows,
    Segment,
    Sizes,
    Splits,
    Strided,
    alignment,
    basis_of,
    kept_as_is,
    masks_of,
    reads_halves,
    strided,
)
from apack_compile.kernels.attend.triton_kernel import ABSENT, DENSE_SEGMENT, PACKED_SEGMENT, attend_kernel
from apack_compile.kernels.attend.triton_latent import expand_kernel, importance_kernel, merge_kernel, project_kernel
from apack_compile.kernels.attend.triton_launch import (
    blocks_per_split,
    choose_launch,
    dense_dot_dtype,
    passes,
    row_tile,
    shared_bytes,
)
from apack_compile.kernels.attend.triton_softmax import LOG2E
from apack_compile.kernels.format import Bands
from apack_compile.kernels.state import COARSE, TEXT, VISION, PackedState, PackedStream, check_tiers
from apack_compile.kernels.triton_bands import (
    COLUMN_BLOCK,
    column_blocks,
    column_count,
    component_count,
    key_layout,
    value_layout,
)
from apack_compile.kernels.triton_turns import pairs_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Head channels and slots that one program of the small kernels takes.
CHANNELS, SLOTS = 64, 64
# The packed segments that the kernels know, in order; those that a state has not are absent.
SEGMENTS = (COARSE, VISION, TEXT)


def serves(query: Tensor, state: PackedState) -> bool:
    """Whether the kernels take these: 16- or 32-bit queries, keys and values of a segment both packed or both kept as they are.

    Relative keys only where they are packed, and whole tiles of tokens share an anchor: blocks of 16, 32, 64 and so on.
    """
    block, segments = state.block, state.segments
    alike = all(segment.key.as_is == segment.value.as_is for segment in segments)
    streams = [stream for segment in segments for stream in (segment.key, segment.value)]
    one_grouping = len({stream.groups for stream in streams if not stream.as_is}) <= 1
    in_tiles = not block or (block >= 16 and block.bit_count() == 1 and not any(s.key.as_is for s in segments))
    return query.dtype in DTYPES and alike and one_grouping and in_tiles


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    state: list[Tensor] | None = None,
    layout: Sequence[int] = (),
    scale: float | None = None,
    vision_importance: Tensor | None = None,
    text_importance: Tensor | None = None,
    tiers: Tensor | None = None,
    partial: int = 0,
    ema: Sequence[float] | None = None,
) -> Tensor:
    """As `reference.attend`, which also serves here what `serves` says no to (float64, a segment half packed, an odd block)."""
    held = PackedState.parse(state, layout)
    if tiers is not None:
        check_tiers(held.layout.kinds)
    if not serves(query, held):
        return reference.attend(
            query, key, value, mask, state, layout, scale, vision_importance, text_importance, tiers, partial, ema
        )
    importance = {VISION: vision_importance, TEXT: text_importance}
    wanted = {segment for segment, known in importance.items() if known is not None and known.numel()}
    with torch.cuda.device_of(query):
        call = _Call(query, key, value, held, wanted, tiers)
        # the kernels' scores are in base 2
        scale = LOG2E.value * (query.shape[-1] ** -0.5 if scale is None else scale)
        call.project(scale)
        call.attend(mask, scale, partial)
        out = call.merge()
        keep_and_add = {VISION: (ema or ())[:2], TEXT: (ema or ())[2:]}
        for segment in sorted(wanted):
            call.update_importance(segment, importance[segment], *keep_and_add[segment])
    return out


@dataclass
class _Packed:
    """A packed segment of a call: its streams, and where its latents go."""

    key: PackedStream
    value: PackedStream
    part: Tensor
    query: Latent
    output: Latent


class _Call:
    """One call: sizes, launch parameters and scratch, and its launches in order."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: PackedState,
        wanted: set[int],
        tiers: Tensor | None,
    ) -> None:
        self.query, self.key, self.value, self.first, self.tail = query, key, value, state.first, state.tail
        self.first_positions, self.cursor, self.wanted = state.first_positions.contiguous(), state.cursor, wanted
        self.positions = {segment.kind: segment.positions.contiguous() for segment in state.segments}
        self.tiers = None if tiers is None else tiers.contiguous()
        rotated = [segment for segment in state.segments if segment.rotations is not None]
        self.turns = {segment.kind: segment.rotations.contiguous() for segment in rotated}
        self.anchor_slots = state.block
        self.batch, self.kv_heads, self.new_tokens, self.head_dim = key.shape
        self.value_dim = value.shape[3]
        self.all_rows = query.shape[1] * query.shape[2]
        self.kv_rows = self.all_rows // self.kv_heads
        self.half = query.dtype.itemsize == 2
        self.streams = {segment.kind: (segment.key, segment.value) for segment in state.segments}
        coded = [pair for pair in self.streams.values() if not pair[0].as_is]
        self.groups = coded[0][0].groups if coded else self.kv_heads
        self.group_rows = self.all_rows // self.groups
        self.launch = choose_launch(
            [key.bands for key, _ in coded],
            [value.bands for _, value in coded],
            self.group_rows,
            self.kv_rows,
            self.head_dim,
            query.dtype.itemsize,
            len(coded) < len(self.streams),
            shared_bytes(query.device),
            state.block,
        )
        self._share_out()
        self._allocate()

    def _share_out(self) -> None:
        """Divide segments into splits, and find place for the scores that are kept."""
        block = self.launch.block
        slots = {segment: pair[0].codes.shape[2] for segment, pair in self.streams.items()}
        blocks = {segment: triton.cdiv(count, block) for segment, count in slots.items()}
        tail_blocks = triton.cdiv(self.tail.slots, block)
        work = [(blocks[segment], self.batch * self._copies(segment)) for segment in self.streams]
        self.tail_copies = self.kv_heads * triton.cdiv(self.kv_rows, self.launch.head_tile)
        self.blocks = blocks_per_split([*work, (tail_blocks, self.batch * self.tail_copies)], self.query.device)
        # the tail's first split has the first and the new tokens, so there is one
        self.tail_splits = max(1, triton.cdiv(tail_blocks, self.blocks))
        self.splits = {segment: triton.cdiv(blocks[segment], self.blocks) for segment in self.streams}
        self.slots = {segment: slots[segment] if self._keeps_scores(segment) else 0 for segment in self.streams}

    def _copies(self, segment: int) -> int:
        """Programs that share each split of a segment: units times tiles of their rows."""
        if self.streams[segment][0].as_is:
            return self.kv_heads * triton.cdiv(self.kv_rows, self.launch.head_tile)
        return self.groups * triton.cdiv(self.group_rows, self.launch.group_tile)

    def _passes(self, segment: int) -> list[tuple[int, int]]:
        """Value tiles of each pass over a packed segment."""
        return passes(self.streams[segment][1].bands, self.launch.group_tile)

    def _keeps_scores(self, segment: int) -> bool:
        """Whether a segment's scores are needed after the first pass."""
        return segment in self.wanted or (not self.streams[segment][0].as_is and len(self._passes(segment)) > 1)

    def _allocate(self) -> None:
        """Scratch: per split, per row, and kept scores."""

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.query.device)

        rows = self.batch, self.all_rows
        kept_as_is = [self.splits[segment] for segment, (key, _) in self.streams.items() if key.as_is]
        self.dense_splits = self.tail_splits + sum(kept_as_is)
        self.lse = scratch(self.batch, self.tail_splits + sum(self.splits.values()), self.all_rows)
        self.dense_part = scratch(self.batch, self.dense_splits, self.all_rows, self.value_dim)
        self.scores = scratch(self.batch, sum(self.slots.values()), self.all_rows) if any(self.slots.values()) else None
        self.row_lse = scratch(*rows) if self.wanted else None
        self.packed: dict[int, _Packed] = {}
        for segment, (key, value) in self.streams.items():
            if key.as_is:
                continue
            layout, columns = key_layout(key.bands), column_count(value_layout(value.bands))
            dot = torch.float16 if self.half else torch.float32
            anchored = self.batch, self._anchors(segment), self.all_rows
            query = Latent(
                scratch(*anchored, column_count(layout), dtype=dot),
                scratch(*anchored),
                scratch(*anchored),
                scratch(*anchored[:2], column_blocks(layout), self.all_rows) if self.half else None,
            )
            output = Latent(scratch(*rows, columns), scratch(*rows))
            self.packed[segment] = _Packed(
                key, value, scratch(self.batch, self.splits[segment], self.all_rows, columns), query, output
            )

    @property
    def sizes(self) -> Sizes:
        """Sizes that the kernels share."""
        return Sizes(
            self.all_rows,
            self.query.shape[2],
            self.group_rows,
            self.kv_rows,
            self.groups,
            self.kv_heads,
            self.first.slots,
            self.new_tokens,
        )

    @property
    def precision(self) -> str:
        """Of products with a basis: three TF32 products are as good as float32 for 16-bit queries."""
        return "tf32x3" if self.half else "ieee"

    def _anchors(self, segment: int) -> int:
        """Anchors that a segment's query latents are turned back to; one where nothing turns."""
        return self.turns[segment].shape[1] if segment in self.turns else 1

    def _has(self) -> dict[str, bool]:
        """Which segments are packed, for the kernels."""
        names = ("HAS_COARSE", "HAS_VISION", "HAS_TEXT")
        return {name: segment in self.packed for name, segment in zip(names, SEGMENTS, strict=True)}

    def _of(self, segment: int | None, name: str) -> Any:
        """An attribute of a packed segment, None where there is none."""
        return getattr(self.packed[segment], name) if segment in self.packed else None

    def _layout(self, segment: int, stream: str) -> tuple[int, ...]:
        """Layout of a packed segment's stream."""
        bands = self._of(segment, stream).bands if segment in self.packed else Bands()
        return key_layout(bands) if stream == "key" else value_layout(bands)

    def _rows_grid(self, streams: Sequence[PackedStream], anchors: int = 1) -> tuple[bool, int, int, int]:
        """Whether one basis serves all sequences, so that their rows go together; row tile; grid of row tiles and KV heads.

        anchors: how often each row is there.
        """
        fold = all(stream.basis.mean.shape[0] == 1 for stream in streams)
        rows = self.kv_rows * anchors * (self.batch if fold else 1)
        return fold, row_tile(rows), triton.cdiv(rows, row_tile(rows)), self.kv_heads * (1 if fold else self.batch)

    def _rows(self, segment: int | None = None) -> Rows:
        """Query rows, with a packed segment's latents."""
        latents = self._of(segment, "query")
        return Rows(self.query, *self.query.stride(), *(latents or ()))

    def project(self, scale: float) -> None:
        """Query latents of the packed segments."""
        if not self.packed:
            return
        streams = {segment: packed.key for segment, packed in self.packed.items()}
        fold, tile, *grid = self._rows_grid(list(streams.values()), max(map(self._anchors, streams)))
        blocks = [column_blocks(self._layout(segment, "key")) if segment in self.packed else 0 for segment in SEGMENTS]
        project_kernel[(*grid, sum(blocks))](
            self._rows(),
            *(basis_of(streams.get(segment)) for segment in SEGMENTS),
            *(self._of(segment, "query") for segment in SEGMENTS),
            *(self.turns.get(segment) for segment in SEGMENTS),
            *(self._anchors(segment) for segment in SEGMENTS),
            *blocks[:2],
            self.sizes,
            self.batch,
            scale,
            **self._has(),
            COARSE=self._layout(COARSE, "key"),
            VISION=self._layout(VISION, "key"),
            TEXT=self._layout(TEXT, "key"),
            PAIRS=tuple(pairs_of(self.turns.get(segment)) for segment in SEGMENTS),
            FOLD=fold,
            HEAD_DIM=self.head_dim,
            PRECISION=self.precision,
            ROW_TILE=tile,
            CHANNELS=_channels(self.head_dim),
        )

    def attend(self, mask: Tensor | None, scale: float, partial: int) -> None:
        """Scores, softmax and latent outputs of every split: all segments in the first launch, values left over in further ones."""
        launch, packed = self.launch, self.packed
        spans = {segment: self._passes(segment) for segment in packed}
        part = {segment: self._of(segment, "part") for segment in SEGMENTS}
        results = Results(self.lse, part[COARSE], part[VISION], part[TEXT], self.dense_part, self.scores)
        values = self._layout(VISION, "value")
        ends = (self.first.key, self.first.value, self.tail.key, self.tail.value)
        first_key, first_value, tail_key, tail_value = map(strided, ends)
        segments = [
            *map(self._segment, SEGMENTS),
            Segment(first_key, None, first_value, None, self.first_positions),
            Segment(tail_key, None, tail_value),
            Segment(strided(self.key), None, strided(self.value)),
        ]
        for number in range(max([1, *map(len, spans.values())])):
            runs = [segment in self.streams and number < len(spans.get(segment, (0,))) for segment in SEGMENTS]
            programs = self.tail_splits * self.tail_copies if number == 0 else 0
            for segment, run in zip(SEGMENTS, runs, strict=True):
                programs += self.splits[segment] * self._copies(segment) if run else 0
            if programs == 0:
                continue
            tiles = {s: spans[s][number] if s in spans and number < len(spans[s]) else (0, 0) for s in SEGMENTS}
            attend_kernel[(programs, self.batch)](
                *(self.splits.get(segment, 0) for segment in SEGMENTS),
                self.tail_splits,
                *(self.streams[segment][0].codes.shape[2] if segment in self.streams else 0 for segment in SEGMENTS),
                self.tail.slots,
                self.blocks,
                *(self._anchors(segment) for segment in SEGMENTS),
                *segments,
                *map(self._rows, SEGMENTS),
                results,
                masks_of(mask),
                self.sizes,
                self.cursor,
                self.tiers,
                scale,
                COARSE_KIND=self._kind(COARSE),
                VISION_KIND=self._kind(VISION),
                TEXT_KIND=self._kind(TEXT),
                COARSE_KEY=self._layout(COARSE, "key"),
                COARSE_VALUE=self._layout(COARSE, "value"),
                VISION_KEY=self._layout(VISION, "key"),
                VISION_VALUE=values,
                TEXT_KEY=self._layout(TEXT, "key"),
                TEXT_VALUE=self._layout(TEXT, "value"),
                EVEN=tuple(
                    reads_halves(self._of(segment, stream)) for segment in SEGMENTS for stream in ("key", "value")
                ),
                PARTIAL=component_count(values) if self.tiers is None else min(partial, component_count(values)),
                FIRST_PASS=number == 0,
                RUNS=tuple(runs),
                COARSE_TILES=tiles[COARSE],
                VISION_TILES=tiles[VISION],
                TEXT_TILES=tiles[TEXT],
                RESIDENT=launch.resident,
                ANCHOR_SLOTS=tuple(self.anchor_slots if s in self.turns else 0 for s in SEGMENTS),
                KEEP_COARSE=self.slots.get(COARSE, 0) > 0,
                KEEP_VISION=self.slots.get(VISION, 0) > 0,
                KEEP_TEXT=self.slots.get(TEXT, 0) > 0,
                ALIGNED=alignment([x for s in segments for x in (s.key, s.value) if isinstance(x, Strided)]),
                CAUSAL=mask is None and 1 < self.new_tokens == self.query.shape[2],
                HEAD_DIM=self.head_dim,
                VALUE_DIM=self.value_dim,
                MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
                MASK_ROWS=mask is not None and mask.shape[1] * mask.shape[2] > 1,
                PACKED_DOT=tl.float16 if self.half else tl.float32,
                DENSE_DOT=dense_dot_dtype(self.query.dtype),
                BLOCK=launch.block,
                GROUP_TILE=launch.group_tile,
                HEAD_TILE=launch.head_tile,
                num_warps=launch.warps,
                num_stages=launch.stages,
            )

    def _kind(self, segment: int) -> int:
        """What a segment is, for the kernel."""
        if segment not in self.streams:
            return ABSENT.value
        return PACKED_SEGMENT.value if segment in self.packed else DENSE_SEGMENT.value

    def _segment(self, segment: int) -> Segment:
        """A segment's tensors, for the kernel."""
        if segment not in self.streams:
            return Segment()
        streams, positions = self.streams[segment], self.positions[segment]
        if segment not in self.packed:
            key, value = (kept_as_is(stream, self.kv_heads) for stream in streams)
            return Segment(key, None, value, None, positions)
        (key, key_scale), (value, value_scale) = (
            (stream.codes.contiguous(), stream.scale.contiguous() if stream.scale.numel() else None)
            for stream in streams
        )
        return Segment(key, key_scale, value, value_scale, positions)

    def merge(self) -> Tensor:
        """The output `[B, H_q, rows, D]`, out of all splits."""
        query = self.query
        out = query.new_empty(*query.shape[:3], self.value_dim)
        merged = Latent(torch.empty_like(out, dtype=torch.float32) if self.packed else out, None)
        splits = {
            segment: Splits(packed.part, packed.part.shape[3], packed.output) for segment, packed in self.packed.items()
        }
        dense = Splits(self.dense_part, self.value_dim, merged)
        columns = 128
        blocks = [triton.cdiv(self.value_dim, columns)]
        blocks += [max(1, triton.cdiv(splits[s].columns, columns)) if s in splits else 0 for s in SEGMENTS]
        merge_kernel[(self.all_rows, self.batch, sum(blocks))](
            self.lse,
            dense,
            *map(splits.get, SEGMENTS),
            self.row_lse,
            *blocks[:3],
            self.dense_splits,
            *(self.splits[segment] if segment in splits else 0 for segment in SEGMENTS),
            self.all_rows,
            **self._has(),
            SPLITS=triton.next_power_of_2(self.lse.shape[1]),
            COLUMNS=columns,
        )
        if not self.packed:
            return out
        fold, tile, *grid = self._rows_grid([packed.value for packed in self.packed.values()])
        expand_kernel[(*grid, triton.cdiv(self.value_dim, _channels(self.value_dim)))](
            merged.latent,
            *(self._of(segment, "output") for segment in SEGMENTS),
            *(basis_of(self._of(segment, "value")) for segment in SEGMENTS),
            out,
            self.sizes,
            self.batch,
            **self._has(),
            COARSE=self._layout(COARSE, "value"),
            VISION=self._layout(VISION, "value"),
            TEXT=self._layout(TEXT, "value"),
            FOLD=fold,
            VALUE_DIM=self.value_dim,
            PRECISION=self.precision,
            ROW_TILE=tile,
            COLUMNS=COLUMN_BLOCK.value,
            CHANNELS=_channels(self.value_dim),
        )
        return out

    def update_importance(self, segment: int, importance: Tensor, keep: float, add: float) -> None:
        """Move a segment's importance towards this step's attention, in place."""
        slots = importance.shape[1]
        importance_kernel[(triton.cdiv(slots, SLOTS), self.batch)](
            self.scores,
            self.row_lse,
            self.positions[segment],
            importance,
            self.cursor,
            self.tiers if segment == VISION else None,
            keep,
            add,
            sum(count for before, count in self.slots.items() if before < segment),
            slots,
            self.scores.shape[1],
            self.sizes,
            BLOCK=SLOTS,
            ROWS=32,
        )


def _channels(head_dim: int) -> int:
    """Channels that a program of the small kernels takes at once."""
    return min(CHANNELS, max(16, triton.next_power_of_2(head_dim)))
