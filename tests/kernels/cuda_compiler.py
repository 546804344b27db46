"""Compiles what the CUDA implementations launch for a Hopper GPU, without one; prints a JSON line per kernel.

Triton is given a driver that says there is such a GPU, looks at what it would load, and launches nothing.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from apack_compile.codec import Bands
from apack_compile.kernels.append.triton import append
from apack_compile.kernels.attend.triton import attend
from apack_compile.kernels.encode.triton import quantize

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Loader:
    """Reads registers, stack and matrix instructions off a binary."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel)
            file.flush()
            usage, code = (
                subprocess.run(
                    [TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
                ).stdout
                for flag in ("-res-usage", "-sass")
            )
        sizes = dict(part.split(":") for part in usage.splitlines()[-1].split() if ":" in part)
        found = {"name": name, "registers": int(sizes["REG"]), "stack": int(sizes["STACK"]), "shared": shared}
        print(json.dumps(found | {"wgmma": code.count("HGMMA")}), flush=True)
        return 0, 0, found["registers"], 0, 1024


class Driver:
    """A Hopper GPU that runs nothing."""

    utils = Loader()

    def launcher_cls(self, source: object, metadata: object):
        return lambda *arguments, **options: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


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


def turns_of(slots, block, head_dim):
    """Turns of a segment of relative keys, zeros."""
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
    turns = {"turns": [turns_of(x.shape[1], block, head_dim) for x in given[4][1:]], "block": block} if block else {}
    attend(query, new, new, mask, None, *given, None, *more, **turns)


def append_with(bands, heads, head_dim, dtype, block=0):
    """Compile what one append launches, and encode."""
    dense, codes, bases, flat, _, cursor = state(bands, heads, 1, head_dim, dtype)
    new = torch.zeros(2, heads, 1, head_dim, dtype=dtype)
    turns = {"text_turns": turns_of(256, block, head_dim), "block": block} if block else {}
    append(new, new, dense[2:] + codes[4:], bases[6:], flat[8:], cursor, **turns)
    quantize(torch.zeros(1, 1, 50, bands.components), torch.ones(1, 1, bands.components), bands, True)


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
    "three segments": lambda: attend_with(ALL_WIDTHS, 16, 16, 1, 64, torch.bfloat16, slots=(1024, 512, 256), mask=MASK),
    "three segments, relative keys": lambda: attend_with(
        ALL_WIDTHS, 28, 4, 1, 128, torch.bfloat16, slots=(1024, 512, 256), block=64
    ),
    "append": lambda: append_with(ALL_WIDTHS, 4, 128, torch.bfloat16),
    "append relative keys": lambda: append_with(ALL_WIDTHS, 4, 128, torch.bfloat16, block=64),
}

if __name__ == "__main__":
    driver.set_active(Driver())
    CASES[sys.argv[1]]()
