"""Interleaved components of keys and queries put in halves, as nodes of a graph."""

import operator
from typing import Any

import torch
from torch import fx

from apack_compile.kernels.rotations import halves_of
from apack_compile.passes.graph.nodes import recorded_as, value_of


def deinterleaved_node(graph: fx.Graph, node: fx.Node, pairs: int) -> fx.Node:
    """`kernels.rotations.deinterleaved` of a node that has a recorded value, at the graph's insertion point; without pairs the node."""
    recorded = recorded_as(node)

    def call(function: Any, *args: Any) -> fx.Node:
        made = graph.call_function(function, args)
        made.meta[recorded] = function(*fx.map_arg(args, value_of))
        return made

    if not pairs:
        return node
    return call(torch.cat, [call(operator.getitem, node, (..., part)) for part in halves_of(pairs)], -1)
