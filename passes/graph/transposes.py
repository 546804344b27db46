"""Transposes and permutes of a node, read back to the tensor that they permute."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from apack_compile.passes.graph.effects import is_pure
from apack_compile.passes.graph.nodes import arguments, constant, kind, same_sizes, shape


@dataclass(frozen=True)
class Transposed:
    """A node whose last two dimensions an operand has swapped, times `scale`; `path`: the nodes that did it."""

    node: fx.Node
    scale: float
    path: tuple[fx.Node, ...]


def permutation(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """What a node permutes, and for each dimension of its result the source's; None for any other node."""
    size, name = shape(node), kind(node)
    if size is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    rank, source = len(size), node.args[0]
    dims = list(range(rank))
    if name == "transpose":
        given = arguments(node, "self", "dim0", "dim1")
        first = given.get("dim0", given.get("axis0"))
        second = given.get("dim1", given.get("axis1"))
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        dims[first], dims[second] = dims[second], dims[first]
    elif name in ("mT", "mH", "adjoint") or (name == "getattr" and node.args[1] in ("mT", "mH")):
        dims[-1], dims[-2] = dims[-2], dims[-1]
    elif name == "permute":
        order = node.kwargs.get("dims", node.args[1] if len(node.args) == 2 else node.args[1:])
        if not isinstance(order, (tuple, list)) or not all(isinstance(dim, int) for dim in order):
            return None
        dims = [dim % rank for dim in order]
    else:
        return None
    return source, tuple(dims)


def last_two_swapped(node: fx.Node) -> Transposed | None:
    """The tensor `[..., T, D]` that an operand `[..., D, T]` was made of by transposes and constant factors."""
    scale, size = 1.0, shape(node)
    path: list[fx.Node] = []
    dims = tuple(range(len(size or ())))
    while isinstance(node, fx.Node):
        path.append(node)
        factor = _factor(node)
        permuted = permutation(node)
        if factor is not None:
            node, scale = factor[0], scale * factor[1]
        elif permuted is not None:
            node, order = permuted
            dims = tuple(order[dim] for dim in dims)
            if dims == (*range(len(dims) - 2), len(dims) - 1, len(dims) - 2):
                return unscaled(node, scale, path)
        elif kind(node) in ("contiguous", "clone") and node.args:
            node = node.args[0]  # type: ignore[assignment]
        else:
            return None
    return None


def unscaled(node: fx.Node, scale: float = 1.0, path: Sequence[fx.Node] = ()) -> Transposed:
    """A tensor less the constant factors that it was multiplied with."""
    path = list(path)
    while (factor := _factor(node)) is not None:
        path.append(node)
        node, scale = factor[0], scale * factor[1]
    return Transposed(node, scale, tuple(path))


def _factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor and the constant it is multiplied with, out of place."""
    if (
        kind(node) not in ("mul", "div")
        or len(node.args) != 2
        or node.kwargs
        or not is_pure(node)
        or shape(node) is None
    ):
        return None
    left, right = node.args
    divides = kind(node) == "div"
    if constant(left) is not None and not divides:
        left, right = right, left
    value = constant(right)
    if not isinstance(left, fx.Node) or value is None or not same_sizes(shape(left) or (), shape(node)):
        return None
    return left, 1.0 / value if divides else value
