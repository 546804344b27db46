"""Instructions that the pass over codes issues for a token, compiled for Hopper without a GPU, next to the time model's limits.

The time model counts what the arithmetic needs; a compiled loop also moves, converts, addresses and sums up. Issuing bounds its time from
below: 132 processors, four instructions a cycle each, 1.8 GHz. Counted is the longest loop of each pass, once for each of its blocks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from attend import SHAPES, Shape, default_groups, named_bands, packed_state
from harness import Row, print_table, write_json
from hopper import Compiled, watch
from limits import load_of, plan_of

from apack_compile.kernels.attend.triton import attend
from apack_compile.plan.rotation import BLOCK
from apack_compile.plan.time_model import H200, dense_limits, packed_limits

INSTRUCTIONS_PER_SECOND = 132 * 4 * 1.8e9
# What is compiled does not depend on the number of tokens; what is predicted does.
COMPILED_TOKENS = 2_048
TOKENS, BATCH = 32_768, 16
KERNEL = "attend_kernel"


def compiled(shape: Shape, ratio: float | None, groups: int, key_block: int) -> list[Compiled]:
    """The kernels of one pass, or more, over the codes of a plan."""
    plan = plan_of(shape, ratio, COMPILED_TOKENS, groups, key_block)
    packed = packed_state(plan, shape, groups, COMPILED_TOKENS, 1, torch.bfloat16, "cpu")
    query = torch.zeros(1, shape.query_heads, 1, shape.head_dim, dtype=torch.bfloat16)
    new = torch.zeros(1, shape.heads, 1, shape.head_dim, dtype=torch.bfloat16)
    found: list[Compiled] = []
    watch(found.append)
    attend(query, new, new, None, *packed.state.flatten(), None)
    return [kernel for kernel in found if kernel.name == KERNEL]


def described(name: str, ratio: float | None, key_block: int, groups: int) -> Row:
    """A row: what is compiled for a plan, and the least time of issuing it."""
    shape = SHAPES[name]
    kernels = compiled(shape, ratio, groups, key_block)
    plan, load = plan_of(shape, ratio, TOKENS, groups, key_block), load_of(shape, TOKENS, BATCH)
    block, tile = (kernels[0].constants[constant] for constant in ("BLOCK", "GROUP_TILE"))
    copies = groups * -(-shape.query_heads // groups // tile)
    per_token = copies * sum(max(kernel.loops) * kernel.warps for kernel in kernels) / block
    limits = packed_limits(plan, 0, load, H200)
    return {
        "shape": name,
        "plan": "rank 64, 16 bits" if ratio is None else f"ratio {ratio:g}",
        "groups": groups,
        "key_block": key_block,
        "bands_key": named_bands(plan.layers[0].text_key.bands),
        "block": block,
        "warps": kernels[0].warps,
        "registers": max(kernel.registers for kernel in kernels),
        "spilled_bytes": max(kernel.stack for kernel in kernels),
        "instructions_per_token": per_token,
        "issue_us": 1e6 * per_token * TOKENS * BATCH / INSTRUCTIONS_PER_SECOND,
        "limit": limits.tightest,
        "limit_us": 1e6 * max(limits.bytes, limits.matrix, limits.unpack),
        "rotating_us": 1e6 * limits.rotating,
        "dense_us": 1e6 * dense_limits(load, H200).seconds,
        "harm": plan.layers[0].text_key.expected_error if ratio else None,
    }


def rows(ratio: float) -> Iterator[Row]:
    """A row for each shape and plan: the paper's, and the ratio's with one basis, what `optimize` takes, one a head or two."""
    for name, shape in SHAPES.items():
        yield described(name, None, 0, 1)
        for key_block in (0, BLOCK):
            chosen = default_groups(shape, ratio, torch.bfloat16, key_block, "cuda")
            for groups in sorted({1, chosen, max(shape.heads // 2, 1), shape.heads}):
                yield described(name, ratio, key_block, groups)


def main(
    ratio: Annotated[float, typer.Option(help="Dense bytes over packed bytes.", min=1.0)] = 8.0,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Print instructions per token, and the least time of a step over 32,768 tokens of 16 sequences."""
    torch.manual_seed(0)
    found = list(rows(ratio))
    print_table(f"compiled for Hopper; {TOKENS} tokens x {BATCH}; nothing was run on it", found)
    if json is not None:
        write_json(json, found, {"predicted_for": H200.name, "ratio": ratio, "triton": triton.__version__})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
