"""Builds a graph node by node, with the fake values that tracing would record: thousands a minute, where Dynamo makes hundreds."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode


class Builder:
    """A graph in the making, and real inputs for it."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[Tensor] = []
        self._mode = FakeTensorMode()

    def input(self, tensor: Tensor) -> fx.Node:
        """A placeholder for a tensor."""
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["example_value"] = self._mode.from_tensor(tensor)
        self.inputs.append(tensor)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, or of the method that a name says."""
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, kwargs)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self._mode, torch.no_grad():
            if isinstance(target, str):
                result = getattr(fake_args[0], target)(*fake_args[1:], **fake_kwargs)
            else:
                result = target(*fake_args, **fake_kwargs)
        node.meta["example_value"] = result
        return node

    def finish(self, outputs: list[fx.Node]) -> fx.GraphModule:
        """The graph as a module that returns `outputs`."""
        self.graph.output(tuple(outputs))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def sizes(node: fx.Node) -> torch.Size:
    """The shape of what a node returns."""
    return node.meta["example_value"].shape
