"""Where the positions at which a graph writes new tokens come from.

What appends checks at run time that positions follow one another and the tokens held. What must be known before is that they are
the caller's: taken from an input, counted on by an arange, and not wrapped around or clamped.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from apack_compile.passes.graph.effects import is_pure
from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import kind, op_name, same_sizes, shape, value_of

# Steps that hand positions on as they are, or a part of them.
SAME = {"to", "contiguous", "clone", "detach", "alias", "view", "reshape", "flatten", "squeeze", "unsqueeze", "expand"}
SAME |= {"select", "slice", "getitem", "item", "_local_scalar_dense", "int", "long", "lift_fresh_copy", "ravel"}
READS_NUMBER = {"item", "_local_scalar_dense"}
COUNTS = {"arange", "add"}
# How many there are is not where they begin.
SIZES = {"sym_size", "sym_numel", "size", "numel", "getattr"}


@dataclass(frozen=True)
class Counted:
    """Positions that are counted on from `inputs`; from numbers alone where there are none. replaced: states that the graph overwrites
    with what they are before it reads them.
    """

    inputs: set[fx.Node] = field(default_factory=set)
    replaced: set[fx.Node] = field(default_factory=set)


def counted(node: Any, reader: fx.Node, memory: Memory) -> Counted | str:
    """Where what `reader` reads as positions comes from; why it is not counted on from inputs."""
    found = Counted()
    return _walk(node, reader, memory, found) or found


def _walk(node: Any, reader: fx.Node, memory: Memory, found: Counted) -> str | None:
    if not isinstance(node, fx.Node) or (kind(node) in SIZES and shape(node) is None):
        return None
    number = isinstance(value_of(node), (int, torch.SymInt))
    write = (None if number else memory.last_write(node, reader)) or (node if kind(node) == "copy" else None)
    if write is not None:
        if kind(write) != "copy" or not _replaces(write):
            return f"its positions are changed by {op_name(write)}"
        found.replaced.add(write.args[0])  # type: ignore[arg-type]
        return _walk(write.args[1], write, memory, found)
    if node.op == "placeholder":
        found.inputs.add(node)
        return None
    if node.op == "get_attr":
        return f"its positions are kept in {node.target}, not given by an input"
    pure, name = is_pure(node), kind(node)
    if name in SAME and node.args and (pure or name in READS_NUMBER):
        terms = [node.args[0]]
    elif name in COUNTS and pure and node.kwargs.get("alpha", 1) == 1:
        terms = list(node.all_input_nodes)
    else:
        return f"its positions are computed by {op_name(node)}"
    return next((why for term in terms if (why := _walk(term, node, memory, found)) is not None), None)


def _replaces(write: fx.Node) -> bool:
    """Whether a copy_ replaces all of a state, not only a part of it."""
    target, source = write.args[:2]
    whole = isinstance(target, fx.Node) and target.op in ("get_attr", "placeholder")
    return whole and isinstance(source, fx.Node) and same_sizes(shape(target) or (), shape(source) or ())


def same_positions(left: object, right: object) -> bool:
    """Whether two graph values are the same by how they are computed."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return type(left) is type(right) and left == right
    if left is right:
        return True
    if left.op != right.op or left.target != right.target or len(left.args) != len(right.args):
        return False
    pure = is_pure(left) or kind(left) in READS_NUMBER
    return pure and left.kwargs == right.kwargs and all(map(same_positions, left.args, right.args))
