"""Instructions that decode attention issues on a Hopper GPU, compiled without one, next to its bytes and its matrix work.

Every launch of a step counts: queries into latents, the pass over the codes, the splits into one, latents into outputs. Counted is what a
program issues, loops as often as they run, times its warps and the programs of the grid. In the pass, programs over codes do not come to
what the compiler put behind the loop over the tail; other branches are counted with what is not taken. 132 processors issue four
instructions a cycle each, at 1.8 GHz.

`at_best` is dense attention's byte limit over the largest of the step's issuing, bytes and matrix work. `in_turn` is the same where each
launch waits for the one before it: the largest of the pass, and issuing of the others.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from attend import SHAPES, Shape, named_bands, packed_state, planned
from harness import Row, print_table, write_json
from hopper import Launch, watch
from limits import load_of, plan_of

from apack_compile.kernels.attend.triton import attend
from apack_compile.kernels.triton_words import column_blocks
from apack_compile.plan.plan import Plan
from apack_compile.plan.time_model import H200, Load, dense_limits, packed_limits

CASES = {"32k x 16": (32_768, 16), "8k x 1": (8_192, 1)}
RATIOS = (8.0, 4.0)
PASS = "attend_kernel"


def launches(plan: Plan, shape: Shape, tokens: int, batch: int) -> list[Launch]:
    """What one step launches."""
    packed = packed_state(plan, shape, plan.groups, tokens, batch, torch.bfloat16, "cpu", filled=False)
    query = torch.zeros(batch, shape.query_heads, 1, shape.head_dim, dtype=torch.bfloat16)
    new = torch.zeros(batch, shape.heads, 1, shape.head_dim, dtype=torch.bfloat16)
    found: list[Launch] = []
    watch(lambda kernel: None, found.append)
    attend(query, new, new, None, *packed.state.flatten(), None)
    return found


def issued(launch: Launch, plan: Plan, shape: Shape, tokens: int, batch: int) -> float:
    """Instructions of all warps of a launch."""
    kernel, constants = launch.kernel, launch.kernel.constants
    straight = kernel.instructions - sum(kernel.loops)
    once = launch.programs * straight
    trips: list[float] = [launch.programs] * len(kernel.loops)
    if kernel.name == PASS:
        copies = batch * plan.groups * -(-shape.query_heads // plan.groups // constants["GROUP_TILE"])
        dense = batch * shape.heads * -(-shape.query_heads // shape.heads // constants["HEAD_TILE"])
        # the pass over codes; then the tail, the first and the new tokens
        once = (launch.programs - dense) * min(kernel.starts[1] - kernel.loops[0], straight) + dense * straight
        trips = [copies * -(-tokens // constants["BLOCK"]), dense * -(-plan.tail_slots // constants["DENSE_BLOCK"])]
        trips += [dense] * (len(kernel.loops) - 2)
    elif kernel.name == "project_kernel":
        trips = [launch.programs * min(constants["BLOCKS"], column_blocks(constants["LAYOUTS"][0]))] * len(kernel.loops)
    elif kernel.name == "expand_kernel":
        trips = [launch.programs * column_blocks(constants["LAYOUTS"][0])] * len(kernel.loops)
    return kernel.warps * (once + sum(n * loop for n, loop in zip(trips, kernel.loops, strict=True)))


def described(name: str, ratio: float | None, key_block: int, groups: int, case: str, chosen: bool) -> Row:
    """A row: what is compiled for a plan, and the least time of a step."""
    shape, (tokens, batch) = SHAPES[name], CASES[case]
    plan, load = plan_of(shape, ratio, tokens, groups, key_block), load_of(shape, tokens, batch)
    found = launches(plan, shape, tokens, batch)
    by_kernel = {launch.kernel.name: issued(launch, plan, shape, tokens, batch) for launch in found}
    seconds = {kernel: count / H200.unpack_operations for kernel, count in by_kernel.items()}
    limits = packed_limits(plan, 0, load, H200)
    least = {"issuing": sum(seconds.values()), "bytes": limits.bytes, "matrix": limits.matrix}
    bound = max(least, key=lambda what: least[what])
    in_turn = max(seconds[PASS], limits.bytes, limits.matrix) + sum(seconds.values()) - seconds[PASS]
    dense = dense_limits(load, H200).seconds
    main = next(one.kernel for one in found if one.kernel.name == PASS and one.kernel.constants["FIRST_PASS"])
    stream = plan.layers[0].text_key
    return {
        "shape": name,
        "plan": "rank 64, 16 bits" if ratio is None else f"ratio {ratio:g}",
        "ratio": ratio,
        "reached": reached(plan, load),
        "tokens": tokens,
        "batch": batch,
        "chosen": chosen,
        "groups": groups,
        "key_block": key_block,
        "bands_key": named_bands(stream.bands),
        "bands_value": named_bands(plan.layers[0].text_value.bands),
        "block": main.constants["BLOCK"],
        "warps": main.warps,
        "registers": main.registers,
        "spilled_bytes": max(launch.kernel.stack for launch in found),
        "instructions_per_token": by_kernel[PASS] / (tokens * batch),
        "instructions_in_all": sum(by_kernel.values()) / (tokens * batch),
        "issue_us": 1e6 * least["issuing"],
        "bytes_us": 1e6 * least["bytes"],
        "matrix_us": 1e6 * least["matrix"],
        "predicted_us": 1e6 * H200.seconds(limits),
        "dense_us": 1e6 * dense,
        "bound": bound,
        "at_best": dense / least[bound],
        "in_turn": dense / in_turn,
    }


def reached(plan: Plan, load: Load) -> float:
    """Dense bytes over packed bytes of the tokens that are packed."""
    streams = (plan.layers[0].text_key, plan.layers[0].text_value)
    bits = sum(8 * plan.groups * (stream.bands.token_bytes + 2 * stream.token_scale) for stream in streams) + 32
    return 2 * 16 * load.width / bits


def rows(ratios: list[float], chosen_alone: bool, cases: list[str]) -> Iterator[Row]:
    """A row for each shape and plan: the paper's, what `optimize` takes for a ratio, and other head groups and key blocks."""
    for case in cases:
        for name, shape in SHAPES.items():
            yield described(name, None, 0, 1, case, True)
            for ratio in ratios:
                chosen = planned(shape, ratio, torch.bfloat16, None, "cuda")
                yield described(name, ratio, chosen.key_block, chosen.count, case, True)
                if chosen_alone:
                    continue
                counts = {2**n for n in range(int(math.log2(shape.heads)) + 1) if shape.heads % 2**n == 0} | {
                    shape.heads
                }
                for groups in sorted(counts):
                    for key_block in (0, 64, 256):
                        wide = shape.heads * shape.head_dim // groups > H200.widest_basis
                        if (groups, key_block) != (chosen.count, chosen.key_block) and not wide:
                            yield described(name, ratio, key_block, groups, case, False)


def main(
    ratio: Annotated[list[float], typer.Option(help="Dense bytes over packed bytes; may be repeated.")] = list(RATIOS),  # noqa: B006
    chosen: Annotated[bool, typer.Option("--chosen", help="What optimize takes on CUDA alone.")] = False,
    case: Annotated[list[str], typer.Option(help="Tokens x batch.")] = list(CASES),  # noqa: B006
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Print instructions per token, and the least time of a step."""
    torch.manual_seed(0)
    found = []
    for row in rows(ratio, chosen, case):
        found.append(row)
        print(", ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    print_table("compiled for Hopper; nothing was run on it", found)
    if json is not None:
        write_json(json, found, {"predicted_for": H200.name, "triton": triton.__version__})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
