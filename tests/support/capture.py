"""A function's Dynamo graph, its inputs, and what running it gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from apack_compile.passes.graph.effects import op_name


@dataclass(frozen=True)
class Captured:
    """A graph and inputs for it; `run` leaves the inputs as they are."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]

    def run(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the inputs after the run (caches are written in place)."""
        inputs = cloned(self.inputs)
        with torch.no_grad():
            out = self.gm(*inputs)
        return list(out), [x for x in inputs if isinstance(x, Tensor)]

    def count(self, name: str) -> int:
        """Calls of an operator or function in the graph."""
        return sum(op_name(node) == name for node in self.gm.graph.nodes if node.op.startswith("call_"))


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> Captured:
    """Trace `fn` into one graph."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            found.append(Captured(gm, tuple(cloned(inputs))))
            return gm(*inputs)

        return run

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (captured,) = found
    return captured


def cloned(values: Sequence[Any]) -> list[Any]:
    """Copies of the tensors."""
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in values]
