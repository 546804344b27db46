"""Where the positions at which a graph writes new tokens come from.

The operation that appends checks at run time that positions follow one another and the tokens held. What must be known before is
that they are the caller's: taken from an input, counted on by an arange, and not wrapped around, clamped or kept in a state.
"""

from typing import Any

from torch import fx

from apack_compile.passes.effects import is_pure
from apack_compile.passes.memory import Memory
from apack_compile.passes.nodes import kind, op_name, same_sizes, shape

# Steps that hand positions on as they are, or a part of them.
SAME = {"to", "contiguous", "clone", "detach", "alias", "view", "reshape", "flatten", "squeeze", "unsqueeze", "expand"}
SAME |= {"select", "slice", "getitem", "item", "_local_scalar_dense", "int", "long", "lift_fresh_copy", "ravel"}
SUMS = {"add"}
COUNTS = {"arange"}


def why_no_position(node: Any, reader: fx.Node, memory: Memory) -> str | None:
    """Why what `reader` reads as positions is not an input's, counted on; None when it is."""
    inputs: set[fx.Node] = set()
    why = _walk(node, reader, memory, inputs)
    return why or (None if inputs else "its positions do not come from an input")


def _walk(node: Any, reader: fx.Node, memory: Memory, inputs: set[fx.Node]) -> str | None:
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        write = memory.last_write(node, reader)
        inputs.add(node)
        return None if write is None else f"its positions are changed by {op_name(write)}"
    write = memory.last_write(node, reader) if shape(node) is not None else None
    if write is not None:
        return _written(node, write, memory, inputs)
    if node.op == "get_attr":
        return f"its positions are kept in {node.target}, not given by an input"
    if kind(node) == "copy" and _replaces(node):
        return _walk(node.args[1], node, memory, inputs)
    if kind(node) in COUNTS and is_pure(node):
        # sizes in it are not positions; a start that is one is walked
        ends = [arg for arg in node.args if isinstance(arg, fx.Node) and not _is_size(arg)]
        return next((why for arg in ends if (why := _walk(arg, node, memory, inputs)) is not None), None)
    if kind(node) in SUMS and is_pure(node) and node.kwargs.get("alpha", 1) == 1:
        terms = [arg for arg in node.args[:2] if not _is_size(arg)]
        return next((why for arg in terms if (why := _walk(arg, node, memory, inputs)) is not None), None)
    if kind(node) in SAME and (is_pure(node) or kind(node) in ("item", "_local_scalar_dense")) and node.args:
        return _walk(node.args[0], node, memory, inputs)
    return f"its positions are computed by {op_name(node)}"


def _written(node: fx.Node, write: fx.Node, memory: Memory, inputs: set[fx.Node]) -> str | None:
    """Through a state that was replaced by what the walk goes on with."""
    if kind(write) == "copy" and _replaces(write):
        return _walk(write.args[1], write, memory, inputs)
    return f"its positions are changed by {op_name(write)}"


def _replaces(write: fx.Node) -> bool:
    """Whether a copy_ replaces all of a state, not only a part of it."""
    target, source = write.args[:2]
    whole = isinstance(target, fx.Node) and target.op in ("get_attr", "placeholder")
    return whole and isinstance(source, fx.Node) and same_sizes(shape(target) or (), shape(source) or ())


def _is_size(node: Any) -> bool:
    """A size of a tensor, of which an arange counts to the end."""
    return isinstance(node, fx.Node) and (kind(node) in ("sym_size", "size", "numel", "sym_numel") or _of_shape(node))


def _of_shape(node: fx.Node) -> bool:
    source = node.args[0] if kind(node) == "getitem" and node.args else None
    shaped = isinstance(source, fx.Node) and kind(source) in ("getattr", "size", "shape")
    return shaped and shape(node) is None
