"""What the time model predicts for decode attention, by shape and plan: limits, the tightest one, head groups and key blocks.

`python benchmarks/limits.py` prints predictions for an H200; nothing runs on a device. Plans are those of attend.py (a ratio's bands over
a synthetic spectrum, the paper's rank 64), with head groups and key blocks as options. What a choice loses is taken from SmolLM2-135M
(harm.py), relative to one basis and blocks of 32; between one basis for all heads and one a head it is interpolated, in the logarithm
of the groups.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from attend import SHAPES, Shape, synthetic_plan
from choices import DEVICES, Option, choose_groups, option_of, shortest_length
from harness import Row, print_table, write_json

from apack_compile.plan.choice import predicted_harm
from apack_compile.plan.plan import LayerPlan, Plan
from apack_compile.plan.rotation import BLOCK, KeyRotation
from apack_compile.plan.time_model import Device, Load, dense_limits, packed_seconds

KEY_BLOCKS = (0, 32, 64, 128, 256)
CASES = {
    "32k x 16": (32_768, 16),
    "4k x 32": (4_096, 32),
    "8k x 1": (8_192, 1),
}
WANTED = {"Qwen2.5-VL-7B": 3.5, "LLaVA-1.5-7B": 5.0, "SmolLM2-135M": 3.5, "Gemma3-4B": 3.5}


def load_of(shape: Shape, tokens: int, batch: int) -> Load:
    """A step of one layer of a shape."""
    return Load(shape.query_heads, shape.heads, shape.head_dim, tokens, batch)


@cache
def plan_of(shape: Shape, ratio: float | None, tokens: int, groups: int, key_block: int, device: str = "cuda") -> Plan:
    """One layer's plan with so many head groups and slots of an anchor, expected to lose what SmolLM2's figures say."""
    plan = synthetic_plan(shape, groups, ratio, tokens, device=device)
    if ratio is None:
        return plan
    rotation = KeyRotation(torch.zeros(shape.head_dim // 2), key_block) if key_block else None
    harm = predicted_harm(shape.heads, groups, key_block)
    streams = LayerPlan(*(replace(stream, expected_error=harm) for stream in plan.layers[0].streams))
    return replace(plan, layers={0: streams}, rotation=rotation)


def group_counts(shape: Shape) -> list[int]:
    """Head groups that the KV heads can be divided into."""
    return [n for n in range(1, shape.heads + 1) if shape.heads % n == 0]


def described(option: Option, load: Load, device: Device) -> Row:
    """Columns of a row about an option."""
    limits, dense = option.limits, dense_limits(load, device).seconds
    return {
        "groups": option.plan.groups,
        "key_block": option.key_block,
        "dense_us": 1e6 * dense,
        "bytes_us": 1e6 * limits.bytes,
        "matrix_us": 1e6 * limits.matrix,
        "unpack_us": 1e6 * limits.unpack,
        "rotating_us": 1e6 * limits.rotating,
        "limit": limits.tightest,
        "time_us": 1e6 * packed_seconds(option.plan, 0, load, device),
        "predicted_speedup": option.speedup,
        "harm": option.error,
    }


def predictions(device: Device, ratio: float) -> Iterator[Row]:
    """Rows: per shape and case, the paper's plan, the default choice, and what the time model would choose."""
    for name, shape in SHAPES.items():
        for case, (tokens, batch) in CASES.items():
            load = load_of(shape, tokens, batch)
            plans = {
                "rank 64, 16 bits": option_of(plan_of(shape, None, tokens, 1, 0), load, device),
                f"ratio {ratio:g}, default": option_of(plan_of(shape, ratio, tokens, 1, BLOCK), load, device),
                f"ratio {ratio:g}, chosen": choose(shape, load, ratio, device, WANTED[name]),
            }
            for plan, option in plans.items():
                yield {"shape": name, "case": case, "plan": plan, **described(option, load, device)}


def choose(shape: Shape, load: Load, ratio: float, device: Device, speedup: float) -> Option:
    """The head groups and key block that lose least of those that are fast enough."""
    plans = [
        plan_of(shape, ratio, load.tokens, groups, block) for groups in group_counts(shape) for block in KEY_BLOCKS
    ]
    return choose_groups(plans, load, device, speedup)


def plan_for_tokens(shape: Shape, ratio: float | None, key_block: int, tokens: int) -> Plan:
    """The plan with one basis for all heads, for a prompt of so many tokens."""
    return plan_of(shape, ratio, tokens, 1, key_block)


def shortest_lengths(device: Device, ratio: float) -> Iterator[Row]:
    """Rows: from which length on packing is predicted to pay."""
    for name, shape in SHAPES.items():
        for batch in (1, 16):
            row: Row = {"shape": name, "batch": batch}
            for title, given, block in (
                ("rank 64, 16 bits", None, 0),
                (f"ratio {ratio:g}, key_block {BLOCK}", ratio, BLOCK),
                (f"ratio {ratio:g}, key_block 256", ratio, 256),
                (f"ratio {ratio:g}, key_block 0", ratio, 0),
            ):
                plan = partial(plan_for_tokens, shape, given, block)
                row[title] = shortest_length(plan, load_of(shape, 0, batch), device)
            yield row


def main(
    device: Annotated[str, typer.Option(help="A device of the time model.")] = "H200",
    ratio: Annotated[float, typer.Option(help="Dense bytes over packed bytes.", min=1.0)] = 8.0,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Print what the time model predicts."""
    if device not in DEVICES:
        raise typer.BadParameter(f"device={device!r} is not one of {', '.join(DEVICES)}")
    torch.manual_seed(0)
    rows = list(predictions(DEVICES[device], ratio))
    print_table(f"predicted for {device}; nothing was run on it", rows)
    lengths = list(shortest_lengths(DEVICES[device], ratio))
    print_table("tokens from which packing is predicted to pay", lengths)
    if json is not None:
        write_json(json, [*rows, *lengths], {"predicted_for": device, "ratio": ratio})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
