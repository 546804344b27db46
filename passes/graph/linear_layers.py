"""Compute linear layers in float32 through oneDNN, on processors where MKL is slow (kernels/linear/cpu.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from apack_compile.passes.base import MatchRecord, Pass
from apack_compile.passes.graph.nodes import arguments, kind, layer_path, value_of


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer whose states and weights are plain float32 on a CPU."""

    node: fx.Node
    states: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    def record(self) -> MatchRecord:
        """What a report shows of the layer."""
        return MatchRecord(self.node.name, layer_path(self.node))


@dataclass(frozen=True)
class LinearThroughOneDnn(Pass):
    """Linear layers in float32 become `apack::linear`."""

    def match(self, graph: fx.Graph) -> list[LinearLayer]:
        """The linear layers that need no gradient."""
        found = (_linear_layer(node) for node in graph.nodes if node.op == "call_function" and kind(node) == "linear")
        return [match for match in found if match is not None]

    def rewrite(self, graph: fx.Graph, matches: Sequence[Any]) -> int:
        """Give the layers to the operation; what each was stays recorded."""
        for match in matches:
            # in place: the node keeps its name, its metadata and its users
            match.node.target = torch.ops.apack.linear.default
            match.node.args, match.node.kwargs = (match.states, match.weight, match.bias), {}
            match.node.meta.pop("source_fn_stack", None)
        return len(matches)


def _linear_layer(node: fx.Node) -> LinearLayer | None:
    given = arguments(node, "input", "weight", "bias")
    match = LinearLayer(node, given["self"], given["weight"], given.get("bias"))
    plain = all(_is_float32_on_cpu(x) for x in (node, match.states, match.weight, match.bias) if x is not None)
    return match if plain and not value_of(node).requires_grad and value_of(match.weight).dim() == 2 else None


def _is_float32_on_cpu(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of no other kind (quantized and distributed ones are), of float32, on a CPU."""
    value = value_of(node)
    return isinstance(value, FakeTensor) and value.dtype == torch.float32 and value.device.type == "cpu"
