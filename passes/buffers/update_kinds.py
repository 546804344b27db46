"""What one node does to a cache: which known update it is, and which dimension of its target the new tokens enter.

A write is an update when it puts new entries at positions of one dimension and leaves all other dimensions whole.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from apack_compile.passes.graph.nodes import arguments, kind, op_name, same_sizes, shape
from apack_compile.passes.graph.views import partial_dims

# What a write writes along: a dimension of its target, None for all of the target, or why it is no update.
Along = int | str | None


def along(node: fx.Node) -> Along:
    """The dimension that an update of a known kind writes along."""
    return KINDS[kind(node)](node)


def target_of(node: fx.Node) -> fx.Node | None:
    """The tensor that an update takes the old tokens from."""
    first = arguments(node, "self").get("self")
    return first if isinstance(first, fx.Node) else None


def _by_dim(node: fx.Node) -> Along:
    """index_copy(cache, dim, positions, new), select_scatter and slice_scatter(cache, new, dim, ...)."""
    names = ("self", "dim") if kind(node) == "index_copy" else ("self", "src", "dim")
    dim = arguments(node, *names).get("dim", 0)
    return dim if isinstance(dim, int) else f"{op_name(node)} along a dimension that is not a constant"


def _scatter(node: fx.Node) -> Along:
    """scatter(cache, dim, positions, new), with a position for each entry of the other dimensions."""
    given = arguments(node, "self", "dim", "index", "src")
    cache, index, dim = shape(given.get("self")), shape(given.get("index")), given.get("dim")
    if given.get("reduce") is not None:
        return f"{op_name(node)} with reduce"
    if cache is None or index is None or not isinstance(dim, int) or len(cache) != len(index):
        return f"{op_name(node)} of unknown shape"
    others = [i for i in range(len(cache)) if i != dim % len(cache)]
    whole = same_sizes([cache[i] for i in others], [index[i] for i in others])
    return dim if whole else f"{op_name(node)} into a part of the other dimensions"


def _index(node: fx.Node) -> Along:
    """cache[:, :, positions] = new, index_put(cache, (None, None, positions), new)."""
    given = arguments(node, "self", "index", "value", "accumulate")
    if given.get("accumulate", False) is not False:
        return f"{op_name(node)} that accumulates"
    index = given.get("index", given.get("indices"))
    if kind(node) == "index_put":
        index = tuple(slice(None) if entry is None else entry for entry in index)
    dims = partial_dims(index, len(shape(given.get("self")) or ()))
    if dims is None or len(dims) > 1:
        return f"{op_name(node)} at positions of several dimensions"
    return dims[0] if dims else None


def _copy(node: fx.Node) -> Along:
    """view_of_cache.copy_(new): all of its target."""
    return None if target_of(node) is not None else f"{op_name(node)} of no tensor"


KINDS: dict[str, Callable[[fx.Node], Along]] = {
    "index_copy": _by_dim,
    "slice_scatter": _by_dim,
    "select_scatter": _by_dim,
    "scatter": _scatter,
    "setitem": _index,
    "index_put": _index,
    "copy": _copy,
}


def concatenated(node: fx.Node) -> tuple[list[Any], int] | None:
    """The tensors that `cat` puts behind one another, and the dimension."""
    given = arguments(node, "tensors", "dim")
    parts, dim = given.get("tensors"), given.get("dim", given.get("axis", 0))
    size = shape(node)
    if kind(node) != "cat" or not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or size is None:
        return None
    return list(parts), dim % len(size)
