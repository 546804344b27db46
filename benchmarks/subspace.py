"""A basis from the covariance of a sequence: eigendecomposition against subspace iteration, cold and from an earlier basis.

`python benchmarks/subspace.py`: the covariance of tokens whose components have `attend.py`'s synthetic variances, rank 64 as the paper
has it. The earlier basis is that of the same sequence without its last 64 tokens, as when a tail is packed. `lost`: variance that the rank
leaves, over what the eigenvectors leave.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from attend import DECAY_PER_WIDTH, DECAY_POWER, PAPER_RANK
from harness import Row, interleaved, print_table, write_json
from torch import Tensor

from apack_compile.plan.basis import moments, principal_rows, symmetric_eigen

WIDTHS = (192, 384, 512, 1_024)
TOKENS, TAIL = 1_024, 64


def leading_eigenvectors(covariance: Tensor, rank: int) -> Tensor:
    """Rows `[..., rank, W]` of the whole eigendecomposition."""
    return symmetric_eigen(covariance)[1].flip(-1).mT[..., :rank, :].contiguous()


def measured(width: int, seconds: float) -> Row:
    """One row: a width."""
    variance = (1 + DECAY_PER_WIDTH * torch.arange(width) / width) ** -DECAY_POWER
    rotated = torch.linalg.qr(torch.randn(width, width)).Q
    x = (torch.randn(1, 1, TOKENS, width) * variance.sqrt()) @ rotated
    covariance, before = moments(x).covariance, moments(x[:, :, :-TAIL]).covariance
    start = leading_eigenvectors(before, PAPER_RANK).half()
    calls = {
        "eigenvectors": partial(leading_eigenvectors, covariance, PAPER_RANK),
        "cold": partial(principal_rows, covariance, PAPER_RANK),
        "warm": partial(principal_rows, covariance, PAPER_RANK, start),
        "moments": partial(moments, x),
    }
    rows = {"eigenvectors": calls["eigenvectors"](), "cold": calls["cold"]()[0], "warm": calls["warm"]()[0]}
    energy = float(covariance.diagonal(dim1=-2, dim2=-1).sum())
    lost = {n: energy - float((r @ covariance @ r.mT).diagonal(dim1=-2, dim2=-1).sum()) for n, r in rows.items()}
    time = {name: timing.median for name, timing in interleaved(calls, seconds).items()}
    return {
        "width": width,
        "rank": PAPER_RANK,
        "moments_ms": 1e3 * time["moments"],
        **{f"{name}_ms": 1e3 * time[name] for name in rows},
        **{f"speedup_{name}": time["eigenvectors"] / time[name] for name in ("cold", "warm")},
        **{f"lost_{name}": lost[name] / lost["eigenvectors"] for name in ("cold", "warm")},
    }


def main(
    width: Annotated[list[int] | None, typer.Option(help="Width of a stream; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less time.")] = False,
) -> None:
    """Time fits of a basis."""
    torch.manual_seed(0)
    rows = [measured(n, 2.0 if quick else 8.0) for n in width or WIDTHS]
    print_table("fit of a basis, CPU", rows)
    if json is not None:
        write_json(json, rows, {"tokens": TOKENS, "tail": TAIL})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
