"""Unpacking a whole packed cache, as a step that was not compiled does: the operation against its reference, by shape and length.

The states are those of attend.py (`ratio=8`, relative keys). `share_of_products`: the time of torch's matrix products of
as many float32 coefficients with the decoders, in the same run, over the operation's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from attend import SHAPES, default_groups, packed_state, synthetic_plan, with_relative_keys
from harness import Row, interleaved, print_table, write_json

from apack_compile.kernels.ops import implementations
from apack_compile.kernels.unpack.reference import unpack as reference
from apack_compile.plan.rotation import BLOCK

RATIO = 8.0
UNPACK = torch.ops.apack.unpack.default


def products(groups: int, width: int, tokens: int, components: list[int]) -> Callable[[], object]:
    """Coefficients `[G, N, r]` times decoders `[G, r, W_g]` of both streams, all float32."""
    pairs = [(torch.randn(groups, tokens, r), torch.randn(groups, r, width)) for r in components]
    return lambda: [x @ decoder for x, decoder in pairs]


def measured(name: str, tokens: int, dtype: torch.dtype, key_block: int, seconds: float) -> Row:
    """One row: a shape, a length."""
    shape = SHAPES[name]
    groups = default_groups(shape, RATIO, dtype, key_block, "cpu")
    plan = with_relative_keys(synthetic_plan(shape, groups, RATIO, tokens), shape, key_block)
    packed = packed_state(plan, shape, groups, tokens, 1, dtype, "cpu")
    new = torch.randn(2, 1, shape.heads, 1, shape.head_dim).to(dtype)
    state = packed.state.flatten()
    width = shape.heads * shape.head_dim // groups
    calls = {
        "operation": lambda: UNPACK(*new, *state, tokens + 1),
        "reference": lambda: reference(*new, *state, tokens + 1),
        "products": products(groups, width, tokens, [bands.components for bands in packed.bands[-2:]]),
    }
    timing = interleaved(calls, seconds)
    return {
        "shape": name,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "key_block": key_block,
        "groups": groups,
        "unpack_ms": 1e3 * timing["operation"].median,
        "reference_ms": 1e3 * timing["reference"].median,
        "speedup_vs_reference": timing["reference"].median / timing["operation"].median,
        "share_of_products": timing["products"].median / timing["operation"].median,
    }


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in the cache; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A model's name; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; may be repeated.")] = None,
    key_block: Annotated[int, typer.Option(help="Slots that share an anchor; 0: keys as they come.")] = BLOCK,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One length, less time.")] = False,
) -> None:
    """Time unpack on a CPU."""
    torch.manual_seed(0)
    operations = implementations("cpu", torch.float32)
    print(operations)
    rows = [
        measured(name, n, getattr(torch, kind), key_block, 0.5 if quick else 2.0)
        for kind in dtype or ["float32", "bfloat16"]
        for name in shape or SHAPES
        for n in tokens or ([512] if quick else [512, 2_048])
    ]
    print_table("unpack, cpu", rows)
    if json is not None:
        write_json(json, rows, {"operations": operations})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
