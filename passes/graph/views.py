"""Views of a tensor: which dimension of the source each dimension is, and of which dimensions only a part is seen."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from apack_compile.passes.graph.nodes import arguments, kind, same_sizes, shape
from apack_compile.passes.graph.transposes import permutation

SAME_MEMORY = {"detach", "alias", "view", "view_as"}


@dataclass(frozen=True)
class View:
    """One step from a view to its source. dims: for each dimension of the view the source's, None for a new one."""

    source: fx.Node
    dims: tuple[int | None, ...]
    narrowed: frozenset[int] = frozenset()


def view_of(node: fx.Node) -> View | None:
    """What a node that is a view looks at; None for any other node, and for a view that merges or splits dimensions."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, name = node.args[0], kind(node)
    before, after = shape(source), shape(node)
    if before is None or after is None:
        return None
    if (permuted := permutation(node)) is not None:
        return View(permuted[0], permuted[1])
    if name in SAME_MEMORY and same_sizes(before, after):
        return View(source, tuple(range(len(before))))
    if name == "getitem":
        return _indexed(source, node.args[1], len(before))
    given = arguments(node, "self", "dim")
    dim = given.get("dim", 0)
    if not isinstance(dim, int) or name not in ("slice", "narrow", "select", "unsqueeze"):
        return None
    dim %= len(after) if name == "unsqueeze" else len(before)
    dims: list[int | None] = list(range(len(before)))
    if name == "unsqueeze":
        dims.insert(dim, None)
    elif name == "select":
        dims.pop(dim)
    whole = name == "unsqueeze" or same_sizes(before, after)
    return View(source, tuple(dims), frozenset() if whole else frozenset({dim}))


def _indexed(source: fx.Node, index: Any, rank: int) -> View | None:
    entries = entries_of(index, rank)
    if entries is None or any(not (entry is None or isinstance(entry, (int, slice))) for entry in entries):
        return None
    dims: list[int | None] = []
    narrowed, at = set(), 0
    for entry in entries:
        if entry is None:
            dims.append(None)
            continue
        if isinstance(entry, slice):
            dims.append(at)
        if entry != slice(None):
            narrowed.add(at)
        at += 1
    return View(source, tuple(dims), frozenset(narrowed))


def entries_of(index: Any, rank: int) -> list[Any] | None:
    """An index with one entry for each dimension (None adds one), Ellipsis written out; None when it has too many."""
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    missing = rank - sum(entry is not None and entry is not Ellipsis for entry in entries)
    if missing < 0:
        return None
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    return [*entries[:at], *[slice(None)] * missing, *entries[at + 1 :]]


def partial_dims(index: Any, rank: int) -> list[int] | None:
    """The dimensions of which an index takes a part; None for an index that cannot be read."""
    entries = entries_of(index, rank)
    if entries is None:
        return None
    return [at for at, entry in enumerate(e for e in entries if e is not None) if entry != slice(None)]
