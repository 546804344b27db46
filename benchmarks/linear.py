"""Linear layers in float32 on a CPU: PyTorch's own product, against the one through oneDNN that the backend puts in its place.

Weights of a layer's shape in turn, more of them than caches hold, as a model reads them. `speedup`: time of PyTorch's product over time of
`apack::linear`, same run, taking turns. `chosen`: whether the backend makes the change on this processor.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from harness import Row, interleaved, print_table, processor, write_json

from apack_compile.kernels.linear.cpu import onednn_is_faster

# Inputs and outputs of SmolLM2-135M's linear layers, and of two of a model of 7 billion weights.
LAYERS = {
    "keys, values": (576, 192),
    "queries, output": (576, 576),
    "gate, up": (576, 1_536),
    "down": (1_536, 576),
    "tokens": (576, 49_152),
    "7B queries": (3_584, 3_584),
    "7B up": (3_584, 18_944),
}
ROWS = (1, 4, 16, 32, 512)
# More than the largest cache of the processors that we know of.
WEIGHTS_BYTES = 2**28


def measured(name: str, rows: int, seconds: float) -> Row:
    """One row: a layer's shape and a number of tokens."""
    inputs, outputs = LAYERS[name]
    count = -(-WEIGHTS_BYTES // (4 * inputs * outputs))
    weights = torch.randn(count, outputs, inputs) * inputs**-0.5
    states = torch.randn(rows, 1, inputs)
    timing = interleaved(
        {
            "pytorch": lambda: [F.linear(states, weight) for weight in weights],
            "onednn": lambda: [torch.ops.apack.linear(states, weight) for weight in weights],
        },
        seconds,
    )
    difference = F.linear(states.double(), weights[0].double()) - torch.ops.apack.linear(states, weights[0])
    return {
        "layer": name,
        "inputs": inputs,
        "outputs": outputs,
        "rows": rows,
        "pytorch_ms": 1e3 * timing["pytorch"].median / count,
        "onednn_ms": 1e3 * timing["onednn"].median / count,
        "speedup": timing["pytorch"].median / timing["onednn"].median,
        "largest_error": float(difference.abs().max()),
        "chosen": onednn_is_faster(),
    }


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less time.")] = False,
) -> None:
    """Time them on a CPU."""
    torch.manual_seed(0)
    rows = [measured(name, count, 0.3 if quick else 2.0) for name in LAYERS for count in ROWS]
    print_table(f"linear layers, float32, {processor()}", rows)
    if json is not None:
        write_json(json, rows)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
