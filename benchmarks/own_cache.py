"""A decode step of a module that owns static buffers, compiled: Inductor alone, this backend lossless, and with own_cache.

Four attention layers with their projections and no other weights, float32. Buffers hold tokens whose components have the variances of
`attend.py`'s spectrum. `dense_over_packed`: time of Inductor's step over the packed one's, same run, taking turns; `error`: relative,
of the step's result against the dense one. Each call writes the same position again.
"""

import copy
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from attend import DECAY_PER_WIDTH, DECAY_POWER, SHAPES, Shape
from harness import Row, interleaved, print_table, write_json
from torch import Tensor, nn

import apack_compile

LAYERS = 4


class Attention(nn.Module):
    """One layer, as gpt-fast writes it."""

    def __init__(self, shape: Shape, capacity: int) -> None:
        super().__init__()
        self.shape = shape
        width = shape.query_heads * shape.head_dim
        kept = shape.heads * shape.head_dim
        self.project, self.out = nn.Linear(width, width + 2 * kept, bias=False), nn.Linear(width, width, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, shape.heads, capacity, shape.head_dim))

    def forward(self, x: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """Attention of the new token over the buffers."""
        heads = self.project(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        query, key, value = heads.split([self.shape.query_heads, self.shape.heads, self.shape.heads], dim=1)
        self.k_cache[:, :, at], self.v_cache[:, :, at] = key, value
        groups = self.shape.query_heads // self.shape.heads
        keys, values = (states.repeat_interleave(groups, dim=1) for states in (self.k_cache, self.v_cache))
        return self.out(F.scaled_dot_product_attention(query, keys, values, mask).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """All layers."""

    def __init__(self, shape: Shape, capacity: int, held: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(shape, capacity) for _ in range(LAYERS))
        width = shape.heads * shape.head_dim
        deviation = (1 + DECAY_PER_WIDTH * torch.arange(width) / width) ** (-DECAY_POWER / 2)
        for layer in self.layers:
            for buffer in (layer.k_cache, layer.v_cache):
                rotation = torch.linalg.qr(torch.randn(width, width)).Q
                tokens = torch.randn(held, width) * deviation @ rotation
                buffer[0, :, :held] = tokens.unflatten(1, (shape.heads, -1)).transpose(0, 1)

    def forward(self, x: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """One step."""
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]), mask, at)
        return x


def measured(name: str, capacity: int, held: int, ratio: float, seconds: float) -> Row:
    """One row: a shape, a capacity, tokens in it, a ratio."""
    shape = SHAPES[name]
    dense = Layers(shape, capacity, held)
    lossless, packed, log = copy.deepcopy(dense), copy.deepcopy(dense), apack_compile.GraphLog()
    own = {"own_cache": True, "ratio": ratio, "strict": True, "log": log}
    torch._dynamo.reset()
    steps = {
        "dense": torch.compile(dense, fullgraph=True),
        "lossless": torch.compile(lossless, fullgraph=True, backend="attentionpack"),
        "packed": torch.compile(packed, fullgraph=True, backend="attentionpack", options=own),
    }
    at = torch.tensor([held])
    inputs = (
        torch.randn(1, 1, shape.query_heads * shape.head_dim),
        (torch.arange(capacity) <= at)[None, None, None],
        at,
    )
    calls = {label: lambda step=step: step(*inputs) for label, step in steps.items()}
    results = {label: call() for label, call in calls.items()}
    timing = interleaved(calls, seconds)
    found = apack_compile.report(log).bytes
    return {
        "shape": name,
        "capacity": capacity,
        "held": held,
        "ratio": ratio,
        "dense_bytes": found["dense_bytes"],
        "packed_bytes": found["packed_bytes"],
        "held_ratio": found["ratio"],
        "error": float((results["packed"] - results["dense"]).norm() / results["dense"].norm()),
        "dense_ms": 1e3 * timing["dense"].median,
        "dense_over_lossless": timing["dense"].median / timing["lossless"].median,
        "dense_over_packed": timing["dense"].median / timing["packed"].median,
    }


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, less time.")] = False,
) -> None:
    """Time decode steps on a CPU."""
    torch.manual_seed(0)
    rows = [
        measured(name, capacity, held, ratio, 0.5 if quick else 4.0)
        for name in (["SmolLM2-135M"] if quick else ["SmolLM2-135M", "Qwen2.5-VL-7B"])
        for capacity, held in ((1_024, 900), (8_192, 2_000), (8_192, 8_000))
        for ratio in (4.0, 8.0)
    ]
    print_table("own_cache, cpu", rows)
    if json is not None:
        write_json(json, rows, {"layers": LAYERS})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
