"""Walk from an attention's key or value back through head repetition to the `apack::unpack` it comes from.

Every step checks what the node does to the shape; a node that is none of the known steps ends the walk and is named.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from apack_compile.passes.graph.effects import is_pure
from apack_compile.passes.graph.nodes import kind, op_name, same_sizes, shape, value_of
from apack_compile.passes.graph.transposes import permutation

UNPACK = "apack::unpack"
# A key that comes out of one of these is a new key; a packed cache further back belongs to another attention.
NEW_KEYS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "conv2d", "embedding"}
NEW_KEYS |= {
    "layer_norm",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "apack::attend",
    "apack::attend_tiers",
}

# Without effect when shape, dtype and device stay.
UNCHANGED = {"contiguous", "clone", "to", "detach", "alias", "expand", "reshape", "view", "slice"}


@dataclass(frozen=True)
class Origin:
    """Where the walk from an attention's key or value ended: an output of `unpack`."""

    unpack: fx.Node
    output: int
    repeats: int
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Stop:
    """Where the walk could not go on."""

    node: fx.Node
    why: str


def is_unpack(node: fx.Node) -> bool:
    """True for a call of `apack::unpack`."""
    return node.op == "call_function" and op_name(node) == UNPACK


def origin(node: Any, groups: int | None = None) -> Origin | Stop:
    """Walk from an attention's key or value back through head repetition to an output of `unpack`.

    groups: the tensor is `[B, H_kv, 1 or groups, T, D]`, beside a query `[B, H_kv, groups, rows, D]`.
    """
    repeats = 1
    path: list[fx.Node] = []
    if groups is not None:
        inserted = _group_dim(node, groups)
        if inserted is None:
            return Stop(
                node, f"{_spelled(node)} between the packed cache and the attention gives no dim of query groups"
            )
        node, path = inserted
    while True:
        path.append(node)
        unpack = node.args[0] if node.op == "call_function" and node.target is operator.getitem else None
        if isinstance(unpack, fx.Node) and is_unpack(unpack):
            return Origin(unpack, node.args[1], repeats, tuple(path))
        step: _Step | Stop | None = (
            _repeat_interleave(node) or _repeat_kv(node) or _transposed_back(node) or _no_change(node)
        )
        if step is None or isinstance(step, Stop):
            return step or Stop(
                node, f"{_spelled(node)} between the packed cache and the attention is no head repetition"
            )
        source, factor, skipped = step
        path += skipped
        repeats, node = repeats * factor, source


def head_repetition(node: fx.Node) -> fx.Node | None:
    """The tensor whose heads a node repeats in one of the ways that keep copies of a head together."""
    step = _repeat_interleave(node) or _repeat_kv(node)
    return None if step is None or isinstance(step, Stop) else step[0]


def _spelled(node: fx.Node) -> str:
    """`reshape of permute`: a reshape alone says little about what was done to the heads."""
    source = node.args[0] if node.args else None
    known = isinstance(source, fx.Node) and source.op.startswith("call_") and source.target is not operator.getitem
    return f"{op_name(node)} of {op_name(source)}" if known else op_name(node)


_Step = tuple[fx.Node, int, list[fx.Node]]


def _repeat_interleave(node: fx.Node) -> _Step | Stop | None:
    """`repeat_interleave(x, n, dim=1)`, method or function; `repeat` and `tile` order the heads differently."""
    if kind(node) != "repeat_interleave":
        return None
    given = {**dict(zip(("self", "repeats", "dim"), node.args, strict=False)), **node.kwargs}
    source = given.get("self", given.get("input"))
    before, after, count, dim = shape(source), shape(node), given.get("repeats"), given.get("dim")
    if not isinstance(count, int) or before is None or after is None or len(before) != 4:
        return Stop(node, "repeat_interleave with a count that is not a constant, or of a tensor that is not 4-D")
    if dim not in (1, -3) or not same_sizes(after, (before[0], before[1] * count, before[2], before[3])):
        return Stop(node, f"repeat_interleave over dim {dim}, heads are dim 1")
    return source, count, []


def _repeat_kv(node: fx.Node) -> _Step | None:
    """`x[:, :, None].expand(B, H, n, T, D).reshape(B, H * n, T, D)`."""
    if kind(node) not in ("reshape", "view", "flatten"):
        return None
    expand = node.args[0] if node.args else None
    copies = []
    while isinstance(expand, fx.Node) and kind(expand) in ("contiguous", "clone") and expand.args:
        copies.append(expand)
        expand = expand.args[0]
    if not isinstance(expand, fx.Node) or kind(expand) != "expand" or not expand.args:
        return None
    inserted = expand.args[0]
    if not isinstance(inserted, fx.Node) or not _inserts_group_dim(inserted):
        return None
    source = inserted.args[0]
    shapes = [shape(n) for n in (source, inserted, expand, node)]
    if not isinstance(source, fx.Node) or any(s is None for s in shapes):
        return None
    before, _, wide, after = shapes
    assert before is not None and wide is not None and after is not None
    if len(before) != 4 or len(wide) != 5 or not isinstance(wide[2], int):
        return None
    batch, heads, tokens, width = before
    right = same_sizes(wide, (batch, heads, wide[2], tokens, width)) and same_sizes(
        after, (batch, heads * wide[2], tokens, width)
    )
    return (source, wide[2], [*copies, expand, inserted]) if right else None


def _group_dim(node: fx.Node, groups: int) -> tuple[fx.Node, list[fx.Node]] | None:
    """`x[:, :, None]` of a 4-D tensor, as it is or expanded to the groups."""
    inserted: fx.Node = node
    size: tuple[Any, ...] = tuple(shape(node) or ())
    if kind(node) == "expand" and isinstance(node.args[0], fx.Node):
        inserted = node.args[0]
    source = inserted.args[0] if _inserts_group_dim(inserted) else None
    before = tuple(shape(source) or ())
    if not isinstance(source, fx.Node) or len(before) != 4 or len(size) != 5 or size[2] not in (1, groups):
        return None
    wide = (*before[:2], size[2], *before[2:])
    return (source, list(dict.fromkeys((node, inserted)))) if same_sizes(size, wide) else None


def _inserts_group_dim(node: fx.Node) -> bool:
    """True for `x[:, :, None]`, `x[:, :, None, :, :]` and `x.unsqueeze(2)` of a 4-D tensor."""
    if kind(node) == "unsqueeze":
        given = {**dict(zip(("self", "dim"), node.args, strict=False)), **node.kwargs}
        return given.get("dim") in (2, -3) and isinstance(given.get("self"), fx.Node) and bool(node.args)
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    index = node.args[1]
    return (
        index[:2] == (slice(None),) * 2
        and len(index) > 2
        and index[2] is None
        and all(i == slice(None) for i in index[3:])
    )


def _transposed_back(node: fx.Node) -> _Step | None:
    """`x.transpose(1, 2).transpose(1, 2)`: two permutes that cancel."""
    outer = permutation(node)
    inner = None if outer is None else permutation(outer[0])
    if outer is None or inner is None or [inner[1][dim] for dim in outer[1]] != list(range(len(outer[1]))):
        return None
    return inner[0], 1, [outer[0]]


def _no_change(node: fx.Node) -> _Step | None:
    """Nodes that return the same numbers in the same places: contiguous, `to` the same type, slices of everything."""
    source = node.args[0] if node.args else None
    before, after = value_of(source), value_of(node)
    if not isinstance(source, fx.Node) or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    kind_before, kind_after = (before.dtype, before.device), (after.dtype, after.device)
    if not is_pure(node) or not same_sizes(before.shape, after.shape) or kind_before != kind_after:
        return None
    slices = node.target is operator.getitem and all(
        isinstance(i, slice) for i in (node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))
    )
    kept = kind(node) in UNCHANGED
    return (source, 1, []) if slices or kept else None


def reads_unpack(node: fx.Node) -> bool:
    """True when the tensor is computed from a packed cache's tokens, not from an earlier attention's result."""
    return bool(_unpacks([node]))


def unpacks_read(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The packed caches that the nodes of an attention read, not those behind an earlier attention's result."""
    nodes = set(nodes)
    return _unpacks([*filter(is_unpack, nodes), *{source for node in nodes for source in node.all_input_nodes} - nodes])


def _unpacks(stack: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        if not is_unpack(here) and kind(here) not in NEW_KEYS and here.op != "call_module":
            stack += here.all_input_nodes
    return set(filter(is_unpack, seen))
