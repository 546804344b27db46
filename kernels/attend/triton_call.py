"""One call of attention in Triton: its sizes, scratch and launches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from apack_compile.kernels.attend.triton_arguments import (
    Latent,
    Results,
    Rows,
    Segment,
    Sizes,
    Splits,
    Strided,
    Transform,
    alignment,
    basis_of,
    codes_of,
    kept_as_is,
    masks_of,
    next_batch,
    strided,
)
from apack_compile.kernels.attend.triton_importance import importance_kernel
from apack_compile.kernels.attend.triton_kernel import attend_kernel
from apack_compile.kernels.attend.triton_latent import (
    block_tiles,
    expand_kernel,
    merge_kernel,
    project_kernel,
)
from apack_compile.kernels.attend.triton_launch import (
    blocks_per_split,
    choose_launch,
    dense_dot_dtype,
    passes,
    row_tile,
    shared_bytes,
)
from apack_compile.kernels.state import MAX_SEGMENTS, VISION, PackedState, PackedStream
from apack_compile.kernels.state import Segment as StateSegment
from apack_compile.kernels.triton_rotations import pairs_of
from apack_compile.kernels.triton_words import COLUMN_BLOCK, SUMMED, column_blocks, column_count, layout_of

# Head channels and slots that one program of the small kernels takes.
CHANNELS, SLOTS = 64, 64


@dataclass(frozen=True)
class Latents:
    """Scratch of a packed segment: latents of its queries, of its splits' outputs, and of the output."""

    query: Latent
    part: Tensor
    output: Latent


class Call:
    """One call: sizes, launch parameters and scratch, and its launches in order. Lists are by packed segment."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: PackedState,
        wanted: set[int],
        tiers: Tensor | None,
    ) -> None:
        self.query, self.key, self.value, self.state, self.wanted = query, key, value, state, wanted
        self.segments, self.tiers = state.segments, None if tiers is None else tiers.contiguous()
        self.positions = [segment.positions.contiguous() for segment in self.segments]
        self.rotations = [None if s.rotations is None else s.rotations.contiguous() for s in self.segments]
        self.batch, self.kv_heads, self.new_tokens, self.head_dim = key.shape
        self.value_dim = value.shape[3]
        self.all_rows = query.shape[1] * query.shape[2]
        self.kv_rows = self.all_rows // self.kv_heads
        self.half = query.dtype.itemsize == 2
        coded = [segment for segment in self.segments if not segment.key.as_is]
        self.groups = coded[0].key.groups if coded else self.kv_heads
        self.group_rows = self.all_rows // self.groups
        self.launch = choose_launch(
            [segment.key.bands for segment in coded],
            [segment.value.bands for segment in coded],
            self.group_rows,
            self.kv_rows,
            self.head_dim,
            query.dtype.itemsize,
            len(coded) < len(self.segments),
            shared_bytes(query.device),
            state.block,
        )
        self._share_out()
        self._allocate()

    def _share_out(self) -> None:
        """Divide segments into splits, and find place for the scores that are kept."""
        block = self.launch.block
        blocks = [triton.cdiv(segment.slots, block) for segment in self.segments]
        tail_blocks = triton.cdiv(self.state.tail.slots, block)
        self.head_copies = self.kv_heads * triton.cdiv(self.kv_rows, self.launch.head_tile)
        group_copies = self.groups * triton.cdiv(self.group_rows, self.launch.group_tile)
        # programs that share each split of a segment: units times tiles of their rows
        self.copies = [self.head_copies if segment.key.as_is else group_copies for segment in self.segments]
        work = [(count, self.batch * copies) for count, copies in zip(blocks, self.copies, strict=True)]
        self.blocks = blocks_per_split(
            [*work, (tail_blocks, self.batch * self.head_copies)], self.launch.warps, self.query.device
        )
        # the tail's first split has the first and the new tokens, so there is one
        self.tail_splits = max(1, triton.cdiv(tail_blocks, self.blocks))
        self.splits = [triton.cdiv(count, self.blocks) for count in blocks]
        # value tiles of each pass over a packed segment; one pass over one that is kept as it is
        self.passes = [
            [(0, 0)] if segment.key.as_is else passes(self._value_layout(segment.value), self.launch.group_tile)
            for segment in self.segments
        ]
        # slots whose scores are needed after the first pass
        self.kept_slots = [
            segment.slots if segment.kind in self.wanted or len(spans) > 1 else 0
            for segment, spans in zip(self.segments, self.passes, strict=True)
        ]

    def _allocate(self) -> None:
        """Scratch: per split, per row, and kept scores."""

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.query.device)

        rows = self.batch, self.all_rows
        kept_as_is = [splits for splits, latents in zip(self.splits, self.segments, strict=True) if latents.key.as_is]
        self.dense_splits = self.tail_splits + sum(kept_as_is)
        self.lse = scratch(self.batch, self.tail_splits + sum(self.splits), self.all_rows)
        self.dense_part = scratch(self.batch, self.dense_splits, self.all_rows, self.value_dim)
        self.scores = scratch(self.batch, sum(self.kept_slots), self.all_rows) if any(self.kept_slots) else None
        self.row_lse = scratch(*rows) if self.wanted else None
        self.latents: list[Latents | None] = []
        for number, segment in enumerate(self.segments):
            if segment.key.as_is:
                self.latents.append(None)
                continue
            layout, columns = key_layout(segment.key), column_count(self._value_layout(segment.value))
            dot = torch.float16 if self.half else torch.float32
            anchored = self.batch, self._anchors(number), self.all_rows
            query = Latent(
                scratch(*anchored, column_count(layout), dtype=dot),
                scratch(*anchored),
                scratch(*anchored),
                scratch(*anchored[:2], column_blocks(layout), self.all_rows) if self.half else None,
            )
            part = scratch(self.batch, self.splits[number], self.all_rows, columns)
            self.latents.append(Latents(query, part, Latent(scratch(*rows, columns), scratch(*rows))))

    @property
    def packed(self) -> list[tuple[int, StateSegment, Latents]]:
        """The segments that are packed: number, tokens and latents."""
        numbered = zip(range(len(self.segments)), self.segments, self.latents, strict=True)
        return [(number, segment, latents) for number, segment, latents in numbered if latents is not None]

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
            self.state.first.slots,
            self.new_tokens,
        )

    @property
    def precision(self) -> str:
        """Of products with a basis: three TF32 products are as good as float32 for 16-bit queries."""
        return "tf32x3" if self.half else "ieee"

    @property
    def rows(self) -> Rows:
        """Query rows."""
        return Rows(self.query, *self.query.stride())

    def _value_layout(self, value: PackedStream) -> tuple[int, ...]:
        """Layout of a stream of values."""
        return layout_of(value.bands, self.launch.value_tile)

    def _anchors(self, number: int) -> int:
        """Anchors that a segment's query latents are rotated back to; one where nothing rotates."""
        rotations = self.rotations[number]
        return 1 if rotations is None else rotations.shape[1]

    def _rows_grid(
        self, streams: Sequence[PackedStream], anchors: int = 1, most: int = 64
    ) -> tuple[bool, int, int, int]:
        """Whether one basis serves all sequences, so that their rows go together; row tile; grid of row tiles and KV heads.

        anchors: how often each row is there.
        """
        fold = all(stream.basis.mean.shape[0] == 1 for stream in streams)
        rows = self.kv_rows * anchors * (self.batch if fold else 1)
        tile = row_tile(rows, largest=most)
        return fold, tile, triton.cdiv(rows, tile), self.kv_heads * (1 if fold else self.batch)

    def project(self, scale: float) -> None:
        """Query latents of the packed segments."""
        if not self.packed:
            return
        keys = [segment.key for _, segment, _ in self.packed]
        anchors, layouts = [self._anchors(number) for number, *_ in self.packed], [key_layout(key) for key in keys]
        fold, tile, *grid = self._rows_grid(
            keys, max(anchors), 128 if max(anchors) > 1 and self.head_dim != 128 else 64
        )
        # queries of many anchors are rotated once for all columns; others are few, and columns are what there is of parallel work
        blocks = max(map(column_blocks, layouts)) if max(anchors) > 1 else 1
        project_kernel[(*grid, sum(block_tiles(layout, blocks) for layout in layouts))](
            self.rows,
            tuple(
                Transform(at.query, basis_of(s.key), self.rotations[number], next_batch(s.positions))
                for number, s, at in self.packed
            ),
            *_of_each(anchors, MAX_SEGMENTS),
            self.sizes,
            self.batch,
            scale,
            LAYOUTS=tuple(layouts),
            PAIRS=tuple(pairs_of(self.rotations[number]) for number, *_ in self.packed),
            FOLD=fold,
            HEAD_DIM=self.head_dim,
            ROW_TILE=tile,
            BLOCKS=blocks,
            num_warps=8 if tile * self.head_dim > 8192 else 4,
            # decoders of wide heads, read ahead, would take more shared memory than there is
            num_stages=2 if self.head_dim > 128 else 3,
        )

    def attend(self, mask: Tensor | None, scale: float, partial: int) -> None:
        """Scores, softmax and latent outputs of every split: all segments in the first launch, values left over in further ones."""
        launch, state, streams = self.launch, self.state, [(s.key, s.value) for s in self.segments]
        where = state.first_positions.contiguous()
        first = Segment(strided(state.first.key), strided(state.first.value), where, next_batch=next_batch(where))
        tail = Segment(strided(state.tail.key), strided(state.tail.value))
        segments, new = tuple(map(self._segment, range(len(streams)))), Segment(strided(self.key), strided(self.value))
        tiered = [self.tiers is not None and segment.kind == VISION for segment in self.segments]
        for number in range(max(map(len, self.passes))):
            runs = [number < len(spans) for spans in self.passes]
            programs = self.tail_splits * self.head_copies if number == 0 else 0
            programs += sum(
                splits * copies for splits, copies, run in zip(self.splits, self.copies, runs, strict=True) if run
            )
            if programs == 0:
                continue
            attend_kernel[(programs, self.batch)](
                *_of_each(self.splits, MAX_SEGMENTS),
                *_of_each([segment.slots for segment in self.segments], MAX_SEGMENTS),
                *_of_each([self._anchors(i) for i in range(len(segments))], MAX_SEGMENTS),
                self.tail_splits,
                state.tail.slots,
                self.blocks,
                segments,
                first,
                tail,
                new,
                self.rows,
                Results(self.lse, self.dense_part, self.scores),
                masks_of(mask),
                self.sizes,
                state.cursor,
                scale,
                PACKED=tuple(not key.as_is for key, _ in streams),
                KEY=tuple(key_layout(key) for key, _ in streams),
                VALUE=tuple(self._value_layout(value) for _, value in streams),
                PARTIAL=tuple(
                    min(partial, value.bands.components) if read else value.bands.components
                    for (_, value), read in zip(streams, tiered, strict=True)
                ),
                ANCHOR_SLOTS=tuple(0 if rotations is None else state.block for rotations in self.rotations),
                KEEPS=tuple(slots > 0 for slots in self.kept_slots),
                RUNS=tuple(runs),
                TILES=tuple(spans[number] if run else (0, 0) for spans, run in zip(self.passes, runs, strict=True)),
                FIRST_PASS=number == 0,
                RESIDENT=launch.resident,
                ALIGNED=alignment(
                    [x for s in (*segments, first, tail, new) for x in (s.key, s.value) if isinstance(x, Strided)]
                ),
                CAUSAL=mask is None and 1 < self.new_tokens == self.query.shape[2],
                HEAD_DIM=self.head_dim,
                VALUE_DIM=self.value_dim,
                MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
                MASK_ROWS=mask is not None and mask.shape[1] * mask.shape[2] > 1,
                PACKED_DOT=tl.float16 if self.half else tl.float32,
                DENSE_DOT=dense_dot_dtype(self.query.dtype),
                ASSEMBLY=not triton.knobs.runtime.interpret,
                BLOCK=launch.block,
                DENSE_BLOCK=launch.dense_block,
                DENSE_STAGES=launch.dense_stages,
                GROUP_TILE=launch.group_tile,
                HEAD_TILE=launch.head_tile,
                ROWS_FIRST=launch.rows_first,
                num_warps=launch.warps,
                num_stages=launch.stages,
                enable_fp_fusion=True,
            )

    def _segment(self, number: int) -> Segment:
        """A segment's tensors, for the kernel."""
        segment, positions, latents = self.segments[number], self.positions[number], self.latents[number]
        streams, read = (segment.key, segment.value), self.tiers if segment.kind == VISION else None
        if latents is None:
            as_is = [kept_as_is(stream, self.kv_heads) for stream in streams]
            return Segment(as_is[0], as_is[1], positions, read=read, next_batch=next_batch(positions))
        codes = [codes_of(stream) for stream in streams]
        scales = [stream.scale.contiguous() if stream.scale.numel() else None for stream in streams]
        (key, value), (key_scale, value_scale), part = codes, scales, latents.part
        return Segment(key, value, positions, key_scale, value_scale, latents.query, part, read, next_batch(positions))

    def merge(self) -> Tensor:
        """The output `[B, H_q, rows, D]`, out of all splits."""
        query, packed = self.query, self.packed
        out = query.new_empty(*query.shape[:3], self.value_dim)
        merged = Latent(torch.empty_like(out, dtype=torch.float32) if packed else out, None)
        parts = [(self.dense_part, merged), *((latents.part, latents.output) for *_, latents in packed)]
        columns = 128
        segments = [Splits(part, part.shape[3], max(1, triton.cdiv(part.shape[3], columns)), to) for part, to in parts]
        merge_kernel[(self.all_rows, self.batch, sum(segment.blocks for segment in segments))](
            *_of_each([self.dense_splits, *(self.splits[number] for number, *_ in packed)], 1 + MAX_SEGMENTS),
            self.lse,
            tuple(segments),
            self.row_lse,
            self.all_rows,
            SEGMENTS=len(segments),
            SPLITS=triton.next_power_of_2(self.lse.shape[1]),
            COLUMNS=columns,
            num_warps=1,
        )
        if not packed:
            return out
        values = [segment.value for _, segment, _ in packed]
        fold, tile, *grid = self._rows_grid(values)
        expand_kernel[(*grid, triton.cdiv(self.value_dim, _channels(self.value_dim)))](
            merged.latent,
            tuple(Transform(latents.output, basis_of(segment.value)) for _, segment, latents in packed),
            out,
            self.sizes,
            self.batch,
            LAYOUTS=tuple(map(self._value_layout, values)),
            FOLD=fold,
            VALUE_DIM=self.value_dim,
            PRECISION=self.precision,
            ROW_TILE=tile,
            COLUMNS=COLUMN_BLOCK.value,
            CHANNELS=_channels(self.value_dim),
        )
        return out

    def update_importance(self, number: int, importance: Tensor, keep: float, add: float) -> None:
        """Move a segment's importance towards this step's attention, in place."""
        slots = importance.shape[1]
        importance_kernel[(triton.cdiv(slots, SLOTS), self.batch)](
            self.scores,
            self.row_lse,
            self.positions[number],
            importance,
            self.state.cursor,
            self.tiers if self.segments[number].kind == VISION else None,
            keep,
            add,
            sum(self.kept_slots[:number]),
            slots,
            self.scores.shape[1],
            self.sizes,
            BLOCK=SLOTS,
            ROWS=32,
        )


def key_layout(key: PackedStream) -> tuple[int, ...]:
    """Layout of a stream of keys."""
    return layout_of(key.bands, SUMMED.value)


def _of_each(numbers: Sequence[int], count: int) -> list[int]:
    """A number for each segment that there is room for, 0 for those that a state has not."""
    return [*numbers, *[0] * (count - len(numbers))]


def _channels(head_dim: int) -> int:
    """Channels that a program of the small kernels takes at once."""
    return min(CHANNELS, max(16, triton.next_power_of_2(head_dim)))
