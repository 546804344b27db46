"""Launch parameters of the decode kernels, from shapes alone: the same shapes give the same grid, so a step can be captured."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from apack_compile.kernels.attend.triton_dense import channel_tile, channel_tiles
from apack_compile.kernels.format import Bands
from apack_compile.kernels.triton_bands import BAND_COUNT
from apack_compile.kernels.triton_words import GIVEN, SUMMED, column_count, fields, layout_of, tile, tiles

# Columns that a product of the matrix unit has at least; attention's are query rows.
SMALLEST_COLUMNS = 8
# Dense tokens of a block.
DENSE_BLOCK = 32
# Accumulators of one pass over the values: half of a multiprocessor's registers. Of a warp: what leaves it registers enough for the rest.
MAX_ACCUMULATORS, WARP_ACCUMULATORS = 16384, 3584
# Of the pass where one warp does it all, and tokens of its blocks.
ONE_WARP_SUMS, ONE_WARP_BLOCK = 4096, 64
# Share of a multiprocessor's memory that a block of tokens and the query latents may take, and its bytes where there is no GPU: Hopper's.
SHARED_SHARE = 0.9
SHARED_BYTES = 232448
# Warps wanted per multiprocessor: what its registers have room for. Processors where there is none: few in the interpreter, else Hopper's.
WARPS_PER_PROCESSOR = 8
INTERPRETED_PROCESSORS, HOPPER_PROCESSORS = 2, 132
MAX_SPLITS = 64

# Components of each band, and words of the narrowest tile.
Layout = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """Tokens of a block, row tiles of head groups and of KV heads, warps, pipeline stages; whether query latents stay on chip.

    dense_block, dense_stages: of the pass over dense tokens. rows_first: how scores of packed tokens lie (triton_packed.py).
    """

    block: int
    dense_block: int
    group_tile: int
    head_tile: int
    warps: int
    stages: int
    dense_stages: int
    resident: bool
    rows_first: bool

    @property
    def value_tile(self) -> int:
        """Words of the narrowest tile of values."""
        return (GIVEN if self.rows_first else SUMMED).value


def shared_bytes(device: torch.device) -> float:
    """Shared memory that a program's tensors may take, bytes."""
    if device.type == "cuda":
        return SHARED_SHARE * torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return SHARED_SHARE * SHARED_BYTES


def row_tile(rows: int, smallest: int = 16, largest: int = 64) -> int:
    """Rows a program takes, of so many: a power of two. smallest: what the matrix unit takes on that side."""
    return min(largest, max(smallest, triton.next_power_of_2(rows)))


def programs_per_processor(warps: int) -> int:
    """Programs of so many warps that are wanted on a multiprocessor."""
    return max(1, WARPS_PER_PROCESSOR // warps)


def choose_launch(
    keys: Sequence[Bands],
    values: Sequence[Bands],
    group_rows: int,
    kv_rows: int,
    head_dim: int,
    itemsize: int,
    kept: bool,
    shared: float,
    anchor_slots: int,
) -> Launch:
    """Launch parameters for packed streams of these bands, and dense tokens of this width; kept: some segment is dense. shared: bytes.

    anchor_slots: slots that share an anchor, 0 where no keys are relative; a block of tokens has one anchor.
    """
    columns = max((column_count(layout_of(bands, SUMMED.value)) for bands in keys), default=0)
    sums = max((column_count(layout_of(bands, GIVEN.value)) for bands in values), default=0)
    packed_bytes = [key.token_bytes + value.token_bytes for key, value in zip(keys, values, strict=True)]
    token_bytes = max([*packed_bytes, sum(packed_bytes) / 2])
    # the compiler was seen to keep the buffers of each packed segment's loop, so a third one takes half as much again as two
    copies = max(len(keys), 2) / 2 if anchor_slots else 1
    padded = row_tile(group_rows)
    one_warp_bytes = copies * itemsize * columns * padded + ONE_WARP_BLOCK * token_bytes
    rows_first = sums * padded <= ONE_WARP_SUMS and one_warp_bytes <= shared / programs_per_processor(1)
    group_tile = padded if rows_first else row_tile(group_rows, SMALLEST_COLUMNS)
    while group_tile > SMALLEST_COLUMNS and itemsize * columns * group_tile > shared / 2:
        group_tile //= 2
    # more rows in a tile would save unpacking, and take more registers than there are
    while group_tile > 16 and columns * group_tile > 2 * WARP_ACCUMULATORS:
        group_tile //= 2
    latents = itemsize * columns * group_tile
    resident = latents <= shared / 2 and not anchor_slots
    held = latents if resident else 0
    # an anchor's latents are loaded with its tokens, and as far ahead of their use
    loaded = copies * latents if anchor_slots else 0
    channels = channel_tile(head_dim) * channel_tiles(head_dim)
    # the compiler was seen to keep the buffers of two dense loops
    dense_bytes = 2 * 2 * itemsize * channels

    def used(block: int, stages: int) -> float:
        dense = stages * min(block, DENSE_BLOCK) * dense_bytes if kept else 0
        return held + max(stages * (loaded + block * token_bytes), dense)

    layouts = [layout_of(bands, SUMMED.value) for bands in values]
    widest = max(
        (sum(pass_columns(layout, span) for span in passes(layout, group_tile)[:1]) for layout in layouts), default=0
    )
    # few warps: each has a score of its own tokens, and what all of them compute is computed as often
    warps = 1 if rows_first else next((n for n in (2, 4) if widest * group_tile <= n * WARP_ACCUMULATORS), 8)
    most = min(ONE_WARP_BLOCK if rows_first else 32 * warps, 128, anchor_slots or 128)
    for block, stages in ((most, 2), (min(most, 64), 2), (min(most, 64), 1), (min(most, 32), 1)):
        if used(block, stages) <= shared / programs_per_processor(warps):
            break
    # the tail is short, and to read it ahead would take registers from the pass over codes
    dense_stages = stages if kept else 1
    head_tile = row_tile(kv_rows, SMALLEST_COLUMNS)
    return Launch(
        block, min(block, DENSE_BLOCK), group_tile, head_tile, warps, stages, dense_stages, resident, rows_first
    )


def tile_columns(layout: Layout) -> list[int]:
    """Latent columns of each value tile."""
    return [fields(band) * tile(layout, band) for band in range(BAND_COUNT.value) for _ in range(tiles(layout, band))]


def pass_columns(layout: Layout, span: tuple[int, int]) -> int:
    """Latent columns of the value tiles of one pass."""
    return sum(tile_columns(layout)[span[0] : span[1]])


def passes(layout: Layout, tile_rows: int) -> list[tuple[int, int]]:
    """Runs of value tiles whose accumulators fit in registers together; at least one, which may be empty."""
    spans, start, held = [], 0, 0
    for number, columns in enumerate(tile_columns(layout)):
        if held and (held + columns) * tile_rows > MAX_ACCUMULATORS:
            spans.append((start, number))
            start, held = number, 0
        held += columns
    return [*spans, (start, len(tile_columns(layout)))]


def blocks_per_split(blocks: Sequence[tuple[int, int]], warps: int, device: torch.device) -> int:
    """Blocks of tokens a program of so many warps takes, for segments of so many blocks, each as often as so many programs want it."""
    processors = INTERPRETED_PROCESSORS if triton.knobs.runtime.interpret else HOPPER_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    total = sum(count * repeats for count, repeats in blocks)
    longest = max((count for count, _ in blocks), default=0)
    return max(1, -(-total // (processors * programs_per_processor(warps))), -(-longest // MAX_SPLITS))


def dense_dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Dtype in which dense tokens of this dtype are multiplied: their own."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        # triton's interpreter multiplies the bits of bfloat16 numbers as integers
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
