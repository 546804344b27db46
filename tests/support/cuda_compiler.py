"""Compiles what the CUDA implementations launch for a Hopper GPU, without one; prints a JSON line per kernel."""

import json
import sys

import state_lists
import torch
from hopper import described, watch

from apack_compile.kernels.append.triton import append
from apack_compile.kernels.attend.triton import attend
from apack_compile.kernels.encode.triton import quantize
from apack_compile.kernels.format import Bands
from apack_compile.kernels.pack.triton import pack
from apack_compile.kernels.state import TEXT, layout_words


def state(bands, heads, groups, head_dim, dtype, batch=2, sequences=1, scaled=True, slots=(512, 256)):
    """State arguments of attend, zeros; no bands for a cache that keeps tokens as they are. slots: of the packed segments."""
    width = heads // groups * head_dim
    dense = [torch.zeros(batch, heads, count, head_dim, dtype=dtype) for count in (4, 4, 128, 128)]
    codes, bases, flat = [], [], []
    for i in range(2 * len(slots)):
        count, no_scale = slots[i // 2], torch.zeros(0, dtype=torch.float16)
        if bands is None:
            codes += [torch.zeros(batch, groups, count, width, dtype=dtype), no_scale]
            bases += [torch.zeros(0)] * 3
            flat += [0] * 4
            continue
        rank = bands.components
        codes.append(torch.zeros(batch, groups, count, bands.token_bytes, dtype=torch.uint8))
        codes.append(torch.zeros(batch, groups, count, dtype=torch.float16) if scaled else no_scale)
        bases += [torch.zeros(sequences, groups, *shape) for shape in ((width,), (rank, width), (rank,))]
        flat += bands.counts
    positions = [torch.zeros(batch, count, dtype=torch.int32) for count in (4, *slots)]
    return dense, codes, bases, flat, positions, torch.tensor([700, 600, 10])


def rotations_of(slots, block, head_dim):
    """Rotations of a segment of relative keys, zeros."""
    return torch.zeros(2, slots // block + 1, 2, head_dim // 2)


def attend_with(bands, query_heads, heads, groups, head_dim, dtype, tiers=False, mask=None, block=0, **kwargs):
    """Compile what one attend launches."""
    given = state(bands, heads, groups, head_dim, dtype, **kwargs)
    query, new = (torch.zeros(2, h, 1, head_dim, dtype=dtype) for h in (query_heads, heads))
    more = ()
    if tiers:
        more = (
            torch.zeros(2, 512),
            torch.zeros(2, 256),
            torch.zeros(2, 2, dtype=torch.int32),
            bands.components // 4,
            [0.2] * 4,
        )
    rotations = (
        {"rotations": [rotations_of(x.shape[1], block, head_dim) for x in given[4][1:]], "block": block}
        if block
        else {}
    )
    state_lists.attend_with(attend)(query, new, new, mask, *given, None, *more, **rotations)


def append_with(bands, heads, head_dim, dtype, block=0):
    """Compile what one append launches, and encode."""
    dense, codes, bases, flat, _, cursor = state(bands, heads, 1, head_dim, dtype)
    new = torch.zeros(2, heads, 1, head_dim, dtype=dtype)
    rotations = {"text_rotations": rotations_of(256, block, head_dim), "block": block} if block else {}
    state_lists.append_with(append)(new, new, dense[2:] + codes[4:], bases[6:], flat[8:], cursor, **rotations)
    quantize(torch.zeros(1, 1, 50, bands.components), torch.ones(1, 1, bands.components), bands, True)


def pack_with(bands, heads, head_dim, dtype, block):
    """Compile what packing a segment launches."""
    _, _, bases, _, _, _ = state(bands, heads, 1, head_dim, dtype)
    new, layout = torch.zeros(2, heads, 64, head_dim, dtype=dtype), layout_words(block, 0, [(TEXT, (bands, bands))])
    real = torch.ones(2, 64, dtype=torch.bool)
    pack(new, new, [*bases[6:], rotations_of(256, block, head_dim)], layout, 1, [True, True], 0, 256, 1, real)


ALL_WIDTHS, RANK_64 = Bands((16, 64, 128, 128)), Bands((64, 0, 0, 0))
MASK = torch.ones(2, 1, 1, 1000, dtype=torch.bool)
CASES = {
    "four widths": lambda: attend_with(ALL_WIDTHS, 28, 4, 1, 128, torch.bfloat16, mask=MASK),
    "rank 64 with tiers": lambda: attend_with(
        RANK_64, 32, 32, 1, 128, torch.float16, tiers=True, sequences=2, scaled=False
    ),
    "one head a group": lambda: attend_with(Bands((0, 0, 32, 32)), 9, 3, 3, 64, torch.bfloat16),
    "kept as it is": lambda: attend_with(None, 16, 4, 1, 72, torch.bfloat16),
    "wide heads": lambda: attend_with(ALL_WIDTHS, 8, 4, 1, 256, torch.bfloat16),
    "relative keys": lambda: attend_with(ALL_WIDTHS, 28, 4, 1, 128, torch.bfloat16, block=64),
    "relative keys, few rows": lambda: attend_with(Bands((0, 0, 48, 64)), 9, 3, 1, 64, torch.bfloat16, block=64),
    "one segment, relative keys": lambda: attend_with(
        ALL_WIDTHS, 28, 4, 1, 128, torch.bfloat16, slots=(1024,), block=64
    ),
    "three segments": lambda: attend_with(ALL_WIDTHS, 16, 16, 1, 64, torch.bfloat16, slots=(1024, 512, 256), mask=MASK),
    "three segments, relative keys": lambda: attend_with(
        ALL_WIDTHS, 28, 4, 1, 128, torch.bfloat16, slots=(1024, 512, 256), block=64
    ),
    "append": lambda: append_with(ALL_WIDTHS, 4, 128, torch.bfloat16),
    "pack": lambda: pack_with(ALL_WIDTHS, 4, 128, torch.bfloat16, block=64),
    "append relative keys": lambda: append_with(ALL_WIDTHS, 4, 128, torch.bfloat16, block=64),
}

if __name__ == "__main__":
    watch(lambda kernel: print(json.dumps(described(kernel)), flush=True))
    CASES[sys.argv[1]]()
