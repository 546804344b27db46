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
    Share,
    Sizes,
    Splits,
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
)
from apack_compile.kernels.attend.triton_softmax import LOG2E
from apack_compile.kernels.layout import TEXT, VISION, PackedStream, packed_streams
from apack_compile.kernels.triton_bands import first_column

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Latent columns, head channels and slots that one program of the small kernels takes.
COLUMNS, CHANNELS, SLOTS = 64, 64, 64


def serves(query: Tensor, packed: Sequence[PackedStream]) -> bool:
    """Whether the kernels take these: 16- or 32-bit queries, keys and values of a segment both packed or both kept as they are."""
    alike = all(key.as_is == value.as_is for key, value in zip(packed[::2], packed[1::2], strict=True))
    one_grouping = len({stream.groups for stream in packed if not stream.as_is}) <= 1
    return query.dtype in DTYPES and alike and one_grouping


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dense: list[Tensor],
    codes: list[Tensor],
    bases: list[Tensor],
    bands: list[int],
    positions: list[Tensor],
    cursor: Tensor,
    scale: float | None,
    vision_importance: Tensor | None = None,
    text_importance: Tensor | None = None,
    tiers: Tensor | None = None,
    partial: int = 0,
    ema: Sequence[float] | None = None,
) -> Tensor:
    """As `reference.attend`, which also serves here what `serves` says no to (float64, a segment half packed)."""
    packed = packed_streams(codes, bases, bands)
    if not serves(query, packed):
        # fmt: off
        return reference.attend(
            query, key, value, mask, bias, dense, codes, bases, bands, positions, cursor, scale,
            vision_importance, text_importance, tiers, partial, ema,
        )
    # fmt: on
    importance = {VISION: vision_importance, TEXT: text_importance}
    wanted = {segment for segment, known in importance.items() if known is not None and known.numel()}
    with torch.cuda.device_of(query):
        call = _Call(query, key, value, dense, packed, positions, cursor, wanted, tiers)
        # the kernels' scores are in base 2
        scale = LOG2E.value * (query.shape[-1] ** -0.5 if scale is None else scale)
        call.project(scale)
        call.attend(mask, bias, scale, partial)
        out = call.merge(bool(wanted))
        for segment in sorted(wanted):
            call.update_importance(segment, importance[segment], *ema[2 * segment - 2 : 2 * segment])
    return out


@dataclass
class _Packed:
    """A packed segment of a call: its streams, its part of the grid, and where its latents go."""

    key: PackedStream
    value: PackedStream
    share: Share
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
        dense: list[Tensor],
        packed: list[PackedStream],
        positions: list[Tensor],
        cursor: Tensor,
        wanted: set[int],
        tiers: Tensor | None,
    ) -> None:
        self.query, self.key, self.value, self.dense = query, key, value, dense
        self.positions, self.cursor, self.wanted = [p.contiguous() for p in positions], cursor, wanted
        self.tiers = None if tiers is None else tiers.contiguous()
        self.batch, self.kv_heads, self.new_tokens, self.head_dim = key.shape
        self.value_dim = value.shape[3]
        self.all_rows = query.shape[1] * query.shape[2]
        self.kv_rows = self.all_rows // self.kv_heads
        self.half = query.dtype.itemsize == 2
        self.streams = dict(zip((VISION, TEXT), zip(packed[::2], packed[1::2], strict=True), strict=False))
        coded = [pair for pair in self.streams.values() if not pair[0].as_is]
        self.groups = coded[0][0].groups if coded else self.kv_heads
        self.group_rows = self.all_rows // self.groups
        self.launch = choose_launch(
            [k.bands for k, _ in coded], [v.bands for _, v in coded], self.group_rows, self.kv_rows, self.head_dim
        )
        self._share_out()
        self._allocate()

    def _share_out(self) -> None:
        """Divide segments into splits, and number splits and kept scores: the dense ones, then vision's, then text's."""
        launch = self.launch
        slots = {segment: pair[0].codes.shape[2] for segment, pair in self.streams.items()}
        self.units = {s: self.kv_heads if pair[0].as_is else self.groups for s, pair in self.streams.items()}
        tile_rows = {
            s: (self.kv_rows, launch.head_tile) if pair[0].as_is else (self.group_rows, launch.group_tile)
            for s, pair in self.streams.items()
        }
        row_tiles = {s: triton.cdiv(*tile) for s, tile in tile_rows.items()}
        head_tiles = triton.cdiv(self.kv_rows, launch.head_tile)
        blocks = {s: triton.cdiv(count, launch.block) for s, count in slots.items()}
        tail_blocks = triton.cdiv(self.dense[2].shape[2], launch.block)
        work = [(blocks[s], self.batch * self.units[s] * row_tiles[s]) for s in self.streams]
        per_split = blocks_per_split([*work, (tail_blocks, self.batch * self.kv_heads * head_tiles)], self.query.device)
        tail_splits = max(1, triton.cdiv(tail_blocks, per_split))
        self.tail = Share(tail_splits * head_tiles * self.kv_heads, tail_splits, head_tiles, per_split, 0, 0)
        self.shares: dict[int, Share] = {}
        first_split, self.slots = tail_splits, 0
        for as_is in (True, False):
            for segment, (stream, _) in self.streams.items():
                if stream.as_is != as_is:
                    continue
                splits = triton.cdiv(blocks[segment], per_split)
                programs = splits * row_tiles[segment] * self.units[segment]
                self.shares[segment] = Share(programs, splits, row_tiles[segment], per_split, first_split, self.slots)
                first_split += splits
                self.slots += slots[segment] if self._keeps_scores(segment) else 0
            if as_is:
                self.dense_splits = first_split
        self.splits = first_split

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
        self.lse = scratch(self.batch, self.splits, self.all_rows)
        self.dense_part = scratch(self.batch, self.dense_splits, self.all_rows, self.value_dim)
        self.scores = scratch(self.batch, self.slots, self.all_rows) if self.slots else None
        self.row_lse = scratch(*rows) if self.wanted else None
        self.packed: dict[int, _Packed] = {}
        for segment, (key, value) in self.streams.items():
            if key.as_is:
                continue
            share = self.shares[segment]
            columns = [first_column(stream.bands.counts, 4) for stream in (key, value)]
            dot = torch.float16 if self.half else torch.float32
            self.packed[segment] = _Packed(
                key,
                value,
                share,
                scratch(self.batch, share.splits, self.all_rows, columns[1]),
                Latent(scratch(*rows, columns[0], dtype=dot), scratch(*rows), scratch(*rows)),
                Latent(scratch(*rows, columns[1]), scratch(*rows)),
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
            self.new_tokens,
            self.splits,
            self.slots,
        )

    @property
    def precision(self) -> str:
        """Of products with a basis: three TF32 products are as good as float32 for 16-bit queries."""
        return "tf32x3" if self.half else "ieee"

    def _of(self, segment: int, name: str) -> Any:
        """An attribute of a packed segment, None where there is none."""
        return getattr(self.packed[segment], name) if segment in self.packed else None

    def _counts(self, segment: int, stream: str) -> tuple[int, int, int, int]:
        """Bands of a packed segment's stream, for the kernels."""
        return self._of(segment, stream).bands.counts if segment in self.packed else (0, 0, 0, 0)

    def _rows_grid(self, streams: Sequence[PackedStream]) -> tuple[bool, int, int, int]:
        """Whether one basis serves all sequences, so that their rows go together; row tile; grid of row tiles and KV heads."""
        fold = all(stream.basis.mean.shape[0] == 1 for stream in streams)
        rows = self.batch * self.kv_rows if fold else self.kv_rows
        return fold, row_tile(rows), triton.cdiv(rows, row_tile(rows)), self.kv_heads * (1 if fold else self.batch)

    def _rows(self, segment: int) -> Rows:
        """Query rows, with a packed segment's latents."""
        latents = self._of(segment, "query")
        return Rows(self.query, *self.query.stride(), *(latents or (None, None, None)))

    def project(self, scale: float) -> None:
        """Query latents of the packed segments."""
        if not self.packed:
            return
        streams = {segment: packed.key for segment, packed in self.packed.items()}
        fold, tile, *grid = self._rows_grid(list(streams.values()))
        blocks = [triton.cdiv(first_column(self._counts(segment, "key"), 4), COLUMNS) for segment in (VISION, TEXT)]
        # a stream of no components still has a mean
        blocks = [max(count, segment in self.packed) for count, segment in zip(blocks, (VISION, TEXT), strict=True)]
        project_kernel[(*grid, sum(blocks))](
            self._rows(0),
            *(basis_of(streams.get(segment)) for segment in (VISION, TEXT)),
            *(self._of(segment, "query") for segment in (VISION, TEXT)),
            blocks[0],
            self.sizes,
            self.batch,
            scale,
            VISION=self._counts(VISION, "key"),
            TEXT=self._counts(TEXT, "key"),
            FOLD=fold,
            HEAD_DIM=self.head_dim,
            PRECISION=self.precision,
            ROW_TILE=tile,
            COLUMNS=COLUMNS,
            CHANNELS=_channels(self.head_dim),
        )

    def attend(self, mask: Tensor | None, bias: Tensor | None, scale: float, partial: int) -> None:
        """Scores, softmax and latent outputs of every split: all segments in the first launch, values left over in further ones."""
        launch, packed = self.launch, self.packed
        spans = {segment: self._passes(segment) for segment in packed}
        part = {segment: self._of(segment, "part") for segment in (VISION, TEXT)}
        results = Results(self.lse, part[VISION], part[TEXT], self.dense_part, self.dense_splits, self.scores)
        none = Share(0, 1, 1, 1, 0, 0)
        components = self._counts(VISION, "value")
        for number in range(max([1, *map(len, spans.values())])):
            shares = [
                self.shares[segment] if segment in self.shares and number < len(spans.get(segment, (0,))) else none
                for segment in (VISION, TEXT)
            ]
            tail = self.tail if number == 0 else none
            programs = sum(share.programs for share in (*shares, tail))
            if programs == 0:
                continue
            tiles = {s: spans[s][number] if s in spans and number < len(spans[s]) else (0, 0) for s in (VISION, TEXT)}
            attend_kernel[(programs, self.batch)](
                *shares,
                tail,
                self._segment(VISION),
                self._segment(TEXT),
                Segment(
                    strided(self.dense[0]),
                    None,
                    strided(self.dense[1]),
                    None,
                    self.positions[0],
                    self.dense[0].shape[2],
                ),
                Segment(strided(self.dense[2]), None, strided(self.dense[3]), None, None, self.dense[2].shape[2]),
                Segment(strided(self.key), None, strided(self.value), None, None, self.new_tokens),
                self._rows(VISION),
                self._rows(TEXT),
                results,
                masks_of(mask, bias),
                self.sizes,
                self.cursor,
                self.tiers,
                scale,
                VISION_KIND=self._kind(VISION),
                TEXT_KIND=self._kind(TEXT),
                VISION_KEY=self._counts(VISION, "key"),
                VISION_VALUE=components,
                TEXT_KEY=self._counts(TEXT, "key"),
                TEXT_VALUE=self._counts(TEXT, "value"),
                EVEN=tuple(
                    reads_halves(self._of(segment, stream)) for segment in (VISION, TEXT) for stream in ("key", "value")
                ),
                PARTIAL=sum(components) if self.tiers is None else min(partial, sum(components)),
                FIRST_PASS=number == 0,
                VISION_TILES=tiles[VISION],
                TEXT_TILES=tiles[TEXT],
                RESIDENT=launch.resident,
                KEEP_VISION=VISION in self.shares and self._keeps_scores(VISION),
                KEEP_TEXT=TEXT in self.shares and self._keeps_scores(TEXT),
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
        slots = positions.shape[1]
        if segment not in self.packed:
            key, value = (kept_as_is(stream, self.kv_heads) for stream in streams)
            return Segment(key, None, value, None, positions, slots)
        (key, key_scale), (value, value_scale) = (
            (stream.codes.contiguous(), stream.scale.contiguous() if stream.scale.numel() else None)
            for stream in streams
        )
        return Segment(key, key_scale, value, value_scale, positions, slots)

    def merge(self, keep_lse: bool) -> Tensor:
        """The output `[B, H_q, rows, D]`, out of all splits."""
        query = self.query
        out = query.new_empty(*query.shape[:3], self.value_dim)
        merged = Latent(torch.empty_like(out, dtype=torch.float32) if self.packed else out, None)
        splits = {
            s: Splits(p.part, p.share.first_split, p.share.splits, p.part.shape[3], p.output)
            for s, p in self.packed.items()
        }
        dense = Splits(self.dense_part, 0, self.dense_splits, self.value_dim, merged)
        columns = 128
        blocks = [triton.cdiv(self.value_dim, columns)]
        blocks += [max(1, triton.cdiv(splits[s].columns, columns)) if s in splits else 0 for s in (VISION, TEXT)]
        merge_kernel[(self.all_rows, self.batch, sum(blocks))](
            self.lse,
            dense,
            splits.get(VISION),
            splits.get(TEXT),
            self.row_lse,
            blocks[0],
            blocks[1],
            self.splits,
            self.all_rows,
            SPLITS=triton.next_power_of_2(self.splits),
            COLUMNS=columns,
        )
        if not self.packed:
            return out
        fold, tile, *grid = self._rows_grid([packed.value for packed in self.packed.values()])
        expand_kernel[(*grid, triton.cdiv(self.value_dim, _channels(self.value_dim)))](
            merged.latent,
            self._of(VISION, "output"),
            self._of(TEXT, "output"),
            *(basis_of(self._of(segment, "value")) for segment in (VISION, TEXT)),
            out,
            self.sizes,
            self.batch,
            VISION=self._counts(VISION, "value"),
            TEXT=self._counts(TEXT, "value"),
            FOLD=fold,
            VALUE_DIM=self.value_dim,
            PRECISION=self.precision,
            ROW_TILE=tile,
            COLUMNS=COLUMNS,
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
            self.shares[segment].first_slot,
            slots,
            self.sizes,
            BLOCK=SLOTS,
            ROWS=32,
        )


def _channels(head_dim: int) -> int:
    """Channels that a program of the small kernels takes at once."""
    return min(CHANNELS, max(16, triton.next_power_of_2(head_dim)))
