"""Attention over a dense cache on a CPU: heads repeated before it, as models write it, against heads shared by it.

`shared`: what the backend makes of it. `speedup` and `enable_gqa_speedup`: time with repeated heads over time with shared ones, and with
`enable_gqa`, same run, taking turns. `largest_difference`: of repeated and shared heads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from attend import SHAPES
from harness import Row, interleaved, print_table, write_json
from torch import Tensor, fx

from apack_compile.passes import RemoveDeadCode, ShareHeads, run_passes


def repeated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Heads repeated as transformers' repeat_kv does."""
    batch, heads, tokens, head_dim = key.shape
    groups = query.shape[1] // heads
    key, value = (
        x[:, :, None].expand(batch, heads, groups, tokens, head_dim).reshape(batch, heads * groups, tokens, head_dim)
        for x in (key, value)
    )
    return F.scaled_dot_product_attention(query, key, value, mask)


def by_argument(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Heads shared by the kernel."""
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def by_backend(inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """What the backend makes of repeated heads, without what compiled code costs to call."""
    found: list[Callable[[], Tensor]] = []

    def backend(gm: fx.GraphModule, example: list[Tensor]) -> Callable[..., tuple[Tensor]]:
        run_passes(gm, (ShareHeads(), RemoveDeadCode()))
        found.append(lambda: gm(*example)[0])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(repeated, backend=backend, dynamic=False)(*inputs)
    return found[0]


def measured(name: str, tokens: int, rows: int, dtype: torch.dtype, seconds: float) -> Row:
    """One row: a shape, a length, a number of query tokens."""
    shape = SHAPES[name]
    query = torch.randn(1, shape.query_heads, rows, shape.head_dim).to(dtype)
    key, value = torch.randn(2, 1, shape.heads, tokens, shape.head_dim).to(dtype)
    mask = (torch.arange(tokens) <= torch.arange(tokens - rows, tokens)[:, None])[None, None]
    inputs = (query, key, value, mask)
    shared = by_backend(inputs)
    calls = {"repeated": lambda: repeated(*inputs), "enable_gqa": lambda: by_argument(*inputs), "shared": shared}
    timing = interleaved(calls, seconds)
    return {
        "shape": name,
        "groups": shape.query_heads // shape.heads,
        "tokens": tokens,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "repeated_ms": 1e3 * timing["repeated"].median,
        "shared_ms": 1e3 * timing["shared"].median,
        "enable_gqa_speedup": timing["repeated"].median / timing["enable_gqa"].median,
        "speedup": timing["repeated"].median / timing["shared"].median,
        "largest_difference": float((repeated(*inputs).double() - shared()).abs().max()),
    }


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less time.")] = False,
) -> None:
    """Time them on a CPU."""
    torch.manual_seed(0)
    rows = [
        measured(name, tokens, queries, dtype, 0.3 if quick else 2.0)
        for dtype in (torch.float32, torch.bfloat16)
        for name, shape in SHAPES.items()
        if shape.query_heads > shape.heads
        for tokens, queries in ((128, 1), (2_048, 1), (2_048, 8), (1_024, 256))
    ]
    print_table("shared heads, cpu", rows)
    if json is not None:
        write_json(json, rows)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
