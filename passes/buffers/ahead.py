"""The positions that a graph will write at, computed from its inputs before it runs."""

import operator
from collections.abc import Iterable

import torch
from torch import fx

from apack_compile.passes.buffers.pairs import BufferPair, BufferStream
from apack_compile.passes.buffers.positions import READS_NUMBER, Counted
from apack_compile.passes.buffers.writes import Span
from apack_compile.passes.graph.effects import is_pure
from apack_compile.passes.graph.nodes import kind, op_name

# Nodes between the graph's inputs and the positions that are written; more is a computation, which would be done twice.
MAX_NODES = 16


def why_not_ahead(stream: BufferStream, origin: Counted) -> str | None:
    """Why the positions of a stream are not known before its graph runs."""
    if origin.replaced:
        return f"its positions are kept in {min(node.name for node in origin.replaced)}, which the graph writes first"
    ends = _ends(stream)
    if ends is None:
        return "the number of its positions is not known before the graph runs"
    nodes = _ancestors(ends)
    unknown = next((n for n in nodes if n.op != "placeholder" and kind(n) not in READS_NUMBER and not is_pure(n)), None)
    if unknown is None and len(nodes) <= MAX_NODES:
        return None
    what = "much is computed" if unknown is None else f"{op_name(unknown)} computes it"
    return f"its positions are not known before the graph runs: {what}"


def index_graph(graph: fx.Graph, pairs: Iterable[BufferPair]) -> fx.Graph:
    """A graph that takes the same inputs and returns the positions that each pair is written at."""
    ends = [_ends(pair.key) or [] for pair in pairs]
    needed = _ancestors(end for these in ends for end in these)
    alone = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = alone.node_copy(node, copies.__getitem__)
    found = []
    for start, *more in ([copies[end] if isinstance(end, fx.Node) else end for end in these] for these in ends):
        if more:
            end, length = more
            end = alone.call_function(operator.add, (start, length)) if end is None else end
            start = alone.call_function(torch.arange, (start, end))
        found.append(start)
    alone.output(tuple(found))
    return alone


def _ends(stream: BufferStream) -> list[fx.Node | int | None] | None:
    """Its positions, or of a slice the start and either end or length; None where the graph does not hold these."""
    index = stream.index
    if not isinstance(index, Span):
        return [index]
    if isinstance(stream.count, int):
        return [index.start, None, stream.count]
    if isinstance(index.length, fx.Node):
        return [index.start, None, index.length]
    return None if index.end is None else [index.start, index.end, None]


def _ancestors(nodes: Iterable[fx.Node | int | None]) -> set[fx.Node]:
    """Nodes and all that they are computed from."""
    seen: set[fx.Node] = set()
    stack = [node for node in nodes if isinstance(node, fx.Node)]
    while stack:
        here = stack.pop()
        if here not in seen:
            seen.add(here)
            stack += here.all_input_nodes
    return seen
