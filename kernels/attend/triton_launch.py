"""Launch parameters of the decode kernels, from shapes alone: the same shapes give the same grid, so a step can be captured."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from apack_compile.kernels.format import Bands
from apack_compile.kernels.triton_bands import (
    BAND_COUNT,
    channel_tile,
    channel_tiles,
    column_count,
    key_layout,
    per_unit,
    tile,
    tiles,
    value_layout,
)

# Accumulators of one pass over the values: half of a multiprocessor's registers.
MAX_ACCUMULATORS = 16384
# Share of a multiprocessor's memory that a block of tokens and the query latents may take, and its bytes where there is no GPU: Hopper's.
SHARED_SHARE = 0.7
SHARED_BYTES = 232448
# Programs wanted per multiprocessor, and a processor count where there is none (the interpreter).
PROGRAMS_PER_PROCESSOR = 2
INTERPRETED_PROCESSORS = 2
MAX_SPLITS = 64


@dataclass(frozen=True)
class Launch:
    """Tokens of a block, row tiles of head groups and of KV heads, warps, pipeline stages; whether query latents stay on chip."""

    block: int
    group_tile: int
    head_tile: int
    warps: int
    stages: int
    resident: bool


def shared_bytes(device: torch.device) -> float:
    """Shared memory that a program's tensors may take, bytes."""
    if device.type == "cuda":
        return SHARED_SHARE * torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return SHARED_SHARE * SHARED_BYTES


def row_tile(rows: int) -> int:
    """Rows a program takes, of so many: a power of two from 16, the matrix unit's smallest, to 64."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


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
    columns = max((column_count(key_layout(bands)) for bands in keys), default=0)
    group_tile = row_tile(group_rows)
    while group_tile > 16 and itemsize * columns * group_tile > shared / 2:
        group_tile //= 2
    latents = itemsize * columns * group_tile
    resident = latents <= shared / 2 and not anchor_slots
    held = latents if resident else 0
    # an anchor's latents are loaded with its tokens, and as far ahead of their use
    # the compiler was seen to keep the buffers of each packed segment's loop, so a third one takes half as much again as two
    loaded = latents * max(len(keys), 2) / 2 if anchor_slots else 0
    channels = channel_tile(head_dim) * channel_tiles(head_dim)
    # with a segment kept as it is, the compiler was seen to keep the buffers of two dense loops
    token_bytes = [(2 if kept else 1) * 2 * itemsize * channels]
    packed_bytes = [key.token_bytes + value.token_bytes for key, value in zip(keys, values, strict=True)]
    token_bytes += [*packed_bytes, sum(packed_bytes) / 2]

    def used(block: int, stages: int) -> float:
        return held + stages * (loaded + block * max(token_bytes))

    for block, stages in ((128, 3), (128, 2), (64, 2), (64, 1), (32, 1)):
        block = min(block, anchor_slots or block)
        if used(block, stages) <= shared:
            break
    widest = max(
        (sum(pass_columns(bands, span) for span in passes(bands, group_tile)[:1]) for bands in values), default=0
    )
    warps = 8 if widest * group_tile > MAX_ACCUMULATORS // 4 else 4
    if warps == 8 and block <= 64 and widest * group_tile <= MAX_ACCUMULATORS // 2:
        # eight warps compute the scores of 64 tokens twice; four do not, but want a second program beside them
        fitting = [fewer for fewer in range(stages, 1, -1) if used(block, fewer) <= shared / 2]
        warps, stages = (4, fitting[0]) if fitting else (warps, stages)
    return Launch(block, group_tile, row_tile(kv_rows), warps, stages, resident)


def tile_columns(bands: Bands) -> list[int]:
    """Latent columns of each value tile."""
    layout = value_layout(bands)
    return [per_unit(band) * tile(layout, band) for band in range(BAND_COUNT.value) for _ in range(tiles(layout, band))]


def pass_columns(bands: Bands, span: tuple[int, int]) -> int:
    """Latent columns of the value tiles of one pass."""
    return sum(tile_columns(bands)[span[0] : span[1]])


def passes(bands: Bands, tile_rows: int) -> list[tuple[int, int]]:
    """Runs of value tiles whose accumulators fit in registers together; at least one, which may be empty."""
    spans, start, held = [], 0, 0
    for number, columns in enumerate(tile_columns(bands)):
        if held and (held + columns) * tile_rows > MAX_ACCUMULATORS:
            spans.append((start, number))
            start, held = number, 0
        held += columns
    return [*spans, (start, len(tile_columns(bands)))]


def blocks_per_split(blocks: Sequence[tuple[int, int]], device: torch.device) -> int:
    """Blocks of tokens a program takes, for segments of so many blocks, each as often as so many programs want it."""
    processors = INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    total = sum(count * repeats for count, repeats in blocks)
    longest = max((count for count, _ in blocks), default=0)
    return max(1, -(-total // (processors * PROGRAMS_PER_PROCESSOR)), -(-longest // MAX_SPLITS))


def dense_dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Dtype in which dense tokens of this dtype are multiplied: their own."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        # triton's interpreter multiplies the bits of bfloat16 numbers as integers
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
