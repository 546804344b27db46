"""Walk from a softmax back over what was done to the scores to the product of queries and keys.

Each step is checked and becomes a part of `Scores`; a node that is none of the known steps ends the walk and is named. Statements
in place count as the functional operation, at the place where they stand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import arguments, constant, kind, op_name, same_sizes, shape, value_of
from apack_compile.passes.graph.transposes import last_two_swapped, unscaled

# Old models mask with -10000: next to scores of usual size its weight is zero in every float type.
MASKED = -1e4
# Same numbers, perhaps in another type or memory.
KEPT = {"to", "contiguous", "clone", "detach", "alias"}
PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


@dataclass(frozen=True)
class Added:
    """A term that is added to the scores: an additive mask, ALiBi, a relative position bias."""

    node: fx.Node


@dataclass(frozen=True)
class Filled:
    """A boolean mask; `keeps` says whether scores stay where it is True, `value` is what the others become."""

    node: fx.Node
    keeps: bool
    value: float


MaskTerm = Added | Filled


@dataclass(frozen=True)
class Scores:
    """softmax's input: `softcap * tanh(scale / softcap * query . key)`, masked by `masks` in order, beside a column of `sinks`.

    `interior` are the nodes that compute it, the product first; `transposed` those between the key and the product; `grouped` says that
    batch and heads share one dimension.
    """

    query: fx.Node
    key: fx.Node
    scale: float
    interior: tuple[fx.Node, ...]
    masks: tuple[MaskTerm, ...] = ()
    softcap: float | None = None
    tanh: bool = False
    sinks: fx.Node | None = None
    grouped: bool = False
    transposed: tuple[fx.Node, ...] = ()

    def then(self, *nodes: fx.Node, **changes: object) -> "Scores":
        """These scores after one more step."""
        return replace(self, interior=(*self.interior, *nodes), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unread:
    """Scores of a query and a key that no attention here can express."""

    why: str


Read = Scores | Unread | None


@dataclass(frozen=True)
class Walk:
    """A walk over one graph; what was read is kept, or a chain of residual sums would be read once per path."""

    memory: Memory
    known: dict[tuple[fx.Node, fx.Node], Read] = field(default_factory=dict)

    def read(self, node: object, reader: fx.Node) -> Read:
        """What `node` holds when `reader` reads it; None when it holds no product of queries and keys."""
        if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
            return None
        if (node, reader) not in self.known:
            self.known[node, reader] = self._read(node, reader)
        return self.known[node, reader]

    def _read(self, node: fx.Node, reader: fx.Node) -> Read:
        if kind(node) not in PRODUCTS and kind(node) not in _STEPS:
            return None
        writer = self.memory.last_write(node, reader)
        if writer is not None and (writer.args[:1] != (node,) or kind(writer) not in _STEPS):
            below = self.read(node, writer)
            return below and Unread(f"{op_name(writer)} writes into the scores")
        node = node if writer is None else writer
        return _product(node) if kind(node) in PRODUCTS else _STEPS[kind(node)](node, self)


def _product(node: fx.Node) -> Read:
    scale, operands = 1.0, list(node.args)
    masks: tuple[MaskTerm, ...] = ()
    if kind(node) == "einsum":
        if len(operands) != 3 or not same_equation(operands[0], "bhqd,bhkd->bhqk"):
            return _unread_einsum(node)
        query, found = operands[1], unscaled(operands[2])
    else:
        if kind(node) == "baddbmm":
            given = arguments(node, "self", "batch1", "batch2")
            if constant(given.get("beta", 1)) != 1.0:
                return Unread("baddbmm with a beta that is not 1")
            if constant(given.get("alpha", 1)) is None:
                return Unread("baddbmm with an alpha that is not a number")
            operands, scale = [given["batch1"], given["batch2"]], constant(given.get("alpha", 1))
            masks = (Added(given["self"]),)
        query, transposed = (*operands, node.kwargs.get("other", node.kwargs.get("mat2")))[:2]
        sizes = shape(query), shape(transposed)
        if None in sizes or len(sizes[0]) != len(sizes[1]) or len(sizes[0]) < 3:
            return None
        found = last_two_swapped(transposed)
        if found is None:
            return Unread("the scores are a product with a key that is not transposed")
    key, scale = found.node, scale * found.scale
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return None
    return Scores(query, key, scale, (node,), masks, grouped=len(shape(node) or ()) == 3, transposed=found.path)


def same_equation(equation: object, wanted: str) -> bool:
    """Whether an einsum equation is `wanted` in other letters."""
    if not isinstance(equation, str):
        return False
    given = equation.replace(" ", "")
    pairs = set(zip(given, wanted, strict=False))
    return len(given) == len(wanted) and len(pairs) == len(set(given)) == len(set(wanted))


def _unread_einsum(node: fx.Node) -> Read:
    operands = [arg for arg in node.args[1:] if isinstance(arg, fx.Node)]
    if len(operands) != 2 or any(len(shape(arg) or ()) < 3 for arg in operands):
        return None
    return Unread(f"einsum {node.args[0]!r} is not 'bhqd,bhkd->bhqk'")


def _scaled(node: fx.Node, walk: Walk) -> Read:
    """mul or div by a constant, in the order scale, softcap, mask."""
    left, right = (*node.args, node.kwargs.get("other"))[:2]
    divides = kind(node) == "div"
    if divides or constant(right) is not None:
        scores, factor = walk.read(left, node), constant(right)
    elif constant(left) is not None:
        scores, factor = walk.read(right, node), constant(left)
    else:
        scores, factor = walk.read(left, node) or walk.read(right, node), None
    if not isinstance(scores, Scores):
        return scores
    if factor is None or not math.isfinite(factor) or factor == 0.0:
        return Unread("the scores are scaled by a tensor, not by a constant")
    factor = 1.0 / factor if divides else factor
    if scores.masks or scores.sinks is not None:
        return Unread("the scores are scaled after they are masked")
    if scores.tanh:
        cap = factor if scores.softcap is None else scores.softcap * factor
        return scores.then(node, scale=scores.scale * factor, softcap=cap)
    return scores.then(node, scale=scores.scale * factor)


def _added(node: fx.Node, walk: Walk) -> Read:
    left, right = (*node.args, node.kwargs.get("other"))[:2]
    first, second = walk.read(left, node), walk.read(right, node)
    if first is not None and second is not None:
        return Unread("the scores are a sum of two products")
    scores, term = (first, right) if second is None else (second, left)
    if not isinstance(scores, Scores):
        return scores
    if not isinstance(term, fx.Node) or node.kwargs.get("alpha", 1) != 1:
        return Unread("a constant, or a multiple of a mask, is added to the scores")
    if scores.sinks is not None:
        return Unread("a mask is added after the sinks")
    return _masked(scores, node, Added(term))


def _masked(scores: Scores, node: fx.Node, term: MaskTerm) -> Read:
    """One more mask. A tensor that is only a mask expanded to the scores' shape is the mask before that."""
    interior = [node]
    mask = term.node
    if kind(mask) == "expand_as" and mask.args[1] in scores.interior and isinstance(mask.args[0], fx.Node):
        interior = [mask, node]
        mask = mask.args[0]
    if not same_sizes(shape(node) or (), shape(scores.interior[-1]) or ()):
        return Unread(f"mask {tuple(shape(mask) or ())} changes the shape of the scores")
    return scores.then(*interior, masks=(*scores.masks, replace(term, node=mask)))


def _filled(node: fx.Node, walk: Walk) -> Read:
    """masked_fill(scores, mask, value)."""
    given = arguments(node, "self", "mask", "value")
    return _filled_by(node, given.get("self"), given.get("mask"), False, given.get("value"), walk)


def _where(node: fx.Node, walk: Walk) -> Read:
    """where(mask, scores, value), where(mask, value, scores), or scores.where(mask, value)."""
    if node.op == "call_method":
        given = arguments(node, "self", "condition", "other")
        return _filled_by(node, given.get("self"), given.get("condition"), True, given.get("other"), walk)
    given = arguments(node, "condition", "self", "other")
    left, right = given.get("self"), given.get("other")
    if constant(left) is not None:
        return _filled_by(node, right, given.get("condition"), False, left, walk)
    return _filled_by(node, left, given.get("condition"), True, right, walk)


def _filled_by(node: fx.Node, source: object, mask: object, keeps: bool, value: object, walk: Walk) -> Read:
    scores, fill = walk.read(source, node), constant(value)
    if not isinstance(scores, Scores):
        return scores
    if fill is None or not fill <= MASKED:
        return Unread(
            f"{op_name(node)} puts {'a tensor' if fill is None else f'{fill:g}'} into the scores, which hides nothing"
        )
    if scores.sinks is not None or not isinstance(mask, fx.Node):
        return Unread(f"{op_name(node)} after the sinks, or without a mask that is a tensor")
    return _masked(scores, node, Filled(mask, keeps, fill))


def _capped(node: fx.Node, walk: Walk) -> Read:
    """tanh, the middle of a softcap."""
    scores = walk.read(node.args[0], node)
    if isinstance(scores, Scores) and (scores.masks or scores.tanh or scores.sinks is not None):
        return Unread("tanh of scores that are already masked or capped")
    return scores.then(node, tanh=True, softcap=1.0) if isinstance(scores, Scores) else scores


def _kept(node: fx.Node, walk: Walk) -> Read:
    scores = walk.read(node.args[0] if node.args else None, node)
    return scores.then(node) if isinstance(scores, Scores) else scores


def _regrouped(node: fx.Node, walk: Walk) -> Read:
    """view or reshape between `[B * H, ...]` and `[B, H, ...]`."""
    scores = walk.read(node.args[0] if node.args else None, node)
    if not isinstance(scores, Scores):
        return scores
    before, after = shape(scores.interior[-1]) or (), shape(node) or ()
    if len(before) < 3 or len(after) < 3 or not same_sizes(before[-2:], after[-2:]):
        return Unread(f"{op_name(node)} changes rows or columns of the scores")
    return scores.then(node, grouped=scores.grouped or not same_sizes(before, after))


def _shifted(node: fx.Node, walk: Walk) -> Read:
    """`scores - scores.amax(-1, keepdim=True)`, which a softmax does not see."""
    left, right = (*node.args, node.kwargs.get("other"))[:2]
    scores = walk.read(left, node)
    if not isinstance(scores, Scores):
        return scores
    largest = right.args[0] if isinstance(right, fx.Node) and kind(right) in ("getattr", "getitem") else right
    if not isinstance(largest, fx.Node) or kind(largest) not in ("max", "amax") or largest.args[:1] != (left,):
        return Unread("something is subtracted from the scores")
    given = arguments(largest, "self", "dim", "keepdim")
    dim = given["dim"][0] if isinstance(given.get("dim"), (list, tuple)) and given["dim"] else given.get("dim")
    picks_values = largest is right or right.args[1] in (0, "values")
    if dim not in (-1, len(shape(node) or ()) - 1) or given.get("keepdim") is not True or not picks_values:
        return Unread("something else than each row's largest score is subtracted from the scores")
    return scores.then(*dict.fromkeys((largest, right)), node)


def _sinks(node: fx.Node, walk: Walk) -> Read:
    """`cat([scores, sinks], -1)`: one more column that takes weight and has no value."""
    given = arguments(node, "tensors", "dim")
    parts, dim = given.get("tensors"), given.get("dim", given.get("axis", 0))
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    scores = walk.read(parts[0], node)
    if not isinstance(scores, Scores):
        return scores
    size = shape(parts[1]) or ()
    if dim not in (-1, len(size) - 1) or not size or size[-1] != 1 or scores.sinks is not None:
        return Unread("the scores are concatenated with more than one column of sinks")
    return scores.then(node, sinks=parts[1])


_STEPS: dict[str, Callable[[fx.Node, Walk], Read]] = {
    **dict.fromkeys(KEPT, _kept),
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("view", "reshape", "unflatten", "flatten"), _regrouped),
    "add": _added,
    "sub": _shifted,
    "masked_fill": _filled,
    "where": _where,
    "tanh": _capped,
    "cat": _sinks,
}  # fmt: skip


def imprecise(nodes: tuple[fx.Node, ...], dtype: torch.dtype) -> fx.Node | None:
    """The first node that computes in a type other than `dtype` and no wider one; None when none does."""
    allowed = {dtype, torch.promote_types(dtype, torch.float32), torch.float64}
    for node in nodes:
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype not in allowed:
            return node
    return None
