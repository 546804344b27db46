"""Find the attentions of a graph, however they are spelled.

Three spellings: `scaled_dot_product_attention`, `flex_attention`, and a softmax between two products (`matmul`). The third is walked
from the softmax: back over the scores (`scores.py`), forward to the product with the values. What is found is typed; what begins
like an attention and goes on otherwise is refused with the reason.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from apack_compile.passes.attention.scores import (
    KEPT,
    PRODUCTS,
    Added,
    Filled,
    MaskTerm,
    Scores,
    Unread,
    Walk,
    same_equation,
)
from apack_compile.passes.graph.effects import live_nodes
from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import arguments, kind, op_name, same_sizes, shape, value_of

SDPA = "scaled_dot_product_attention"
FLEX = "flex_attention"
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class Attention:
    """One attention: `node` returns `softmax(scale * query . key, softcapped, masked, beside sinks) . value`.

    scale: None means `1 / sqrt(D)`. interior: nodes between the inputs and `node`, in the graph's order, that serve it alone;
    `grouped`: batch and heads share one dimension in some of them. transposed: nodes between `key` and the product with it.
    """

    node: fx.Node
    spelling: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    masks: tuple[MaskTerm, ...] = ()
    scale: float | None = None
    softcap: float | None = None
    sinks: fx.Node | None = None
    dropout: float | fx.Node = 0.0
    is_causal: bool | fx.Node = False
    enable_gqa: bool = False
    grouped: bool = False
    interior: tuple[fx.Node, ...] = ()
    transposed: tuple[fx.Node, ...] = ()

    def details(self) -> dict[str, object]:
        """What a report shows of it."""
        found = {
            "spelling": self.spelling,
            "query": [str(size) for size in shape(self.query) or ()],
            "key": [str(size) for size in shape(self.key) or ()],
            "masks": [_mask_name(term) for term in self.masks],
            "dtype": str(value_of(self.query).dtype) if value_of(self.query) is not None else None,
            "scale": self.scale,
        }
        if self.softcap is not None:
            found["softcap"] = self.softcap
        if self.sinks is not None:
            found["sinks"] = self.sinks.name
        return found


def _mask_name(term: MaskTerm) -> str:
    sizes = ", ".join(str(size) for size in shape(term.node) or ())
    return f"{'added' if isinstance(term, Added) else 'boolean'} {term.node.name} [{sizes}]"


@dataclass(frozen=True)
class NoAttention:
    """What begins like an attention and is none that is known, and why; `interior` is what was read of it."""

    node: fx.Node
    why: str
    interior: tuple[fx.Node, ...]


def find_attentions(graph: fx.Graph, memory: Memory) -> list[Attention | NoAttention]:
    """Every attention of the graph, in the order of their last nodes."""
    live, walk = live_nodes(graph), Walk(memory)
    found = [match for node in graph.nodes if node in live and (match := _read(node, walk, live)) is not None]
    return sorted(found, key=lambda match: memory.order[match.node])


def _read(node: fx.Node, walk: Walk, live: set[fx.Node]) -> Attention | NoAttention | None:
    if node.op not in ("call_function", "call_method"):
        return None
    name = kind(node)
    if name == SDPA:
        return _sdpa(node)
    if name == FLEX and len(node.args) >= 3:
        query, key, value = node.args[:3]
        return Attention(node, FLEX, query, key, value)  # type: ignore[arg-type]
    return _around_softmax(node, walk, live) if name == "softmax" else None


def _sdpa(node: fx.Node) -> Attention:
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    given: dict[str, Any] = {**defaults, **arguments(node, *SDPA_ARGUMENTS)}
    mask = given["attn_mask"]
    masks: tuple[MaskTerm, ...] = ()
    if isinstance(mask, fx.Node):
        is_bool = getattr(value_of(mask), "dtype", None) is torch.bool
        masks = (Filled(mask, True, -math.inf) if is_bool else Added(mask),)
    return Attention(
        node=node,
        spelling=SDPA,
        query=given["query"],
        key=given["key"],
        value=given["value"],
        masks=masks,
        scale=given["scale"],
        dropout=given["dropout_p"],
        is_causal=given["is_causal"],
        enable_gqa=given["enable_gqa"] is True,
    )


def _around_softmax(node: fx.Node, walk: Walk, live: set[fx.Node]) -> Attention | NoAttention | None:
    given = arguments(node, "self", "dim")
    scores = walk.read(given.get("self"), node)
    if scores is None:
        return None
    if isinstance(scores, Unread):
        return NoAttention(node, scores.why, _between_products(node))
    if given.get("dim") not in (-1, len(shape(node) or ()) - 1):
        return NoAttention(node, f"softmax over dim {given.get('dim')}, keys are the last", _between_products(node))
    weights = _weights(node, scores, live)
    if isinstance(weights, Unread):
        return NoAttention(node, weights.why, _between_products(node))
    interior = tuple(sorted({*scores.interior, *weights.interior}, key=walk.memory.order.__getitem__))
    if any(inner.kwargs.get("out") is not None for inner in (*interior, weights.node)):
        return NoAttention(weights.node, "a step writes to a tensor given by out=", interior)
    for inner in interior:
        outside = next((user for user in inner.users if user in live and user not in {*interior, weights.node}), None)
        if outside is not None:
            what = "attention weights" if inner in weights.interior else "scores"
            return NoAttention(weights.node, f"the {what} are also used by {op_name(outside)}", interior)
    return Attention(
        node=weights.node,
        spelling="matmul",
        query=scores.query,
        key=scores.key,
        value=weights.value,
        masks=scores.masks,
        scale=scores.scale,
        softcap=scores.softcap,
        sinks=scores.sinks,
        dropout=weights.dropout,
        grouped=scores.grouped or weights.grouped,
        interior=interior,
        transposed=scores.transposed,
    )


@dataclass(frozen=True)
class _Weights:
    """The way from a softmax to the product with the values, `node`."""

    node: fx.Node
    value: fx.Node
    dropout: float | fx.Node
    grouped: bool
    interior: tuple[fx.Node, ...]


def _weights(softmax: fx.Node, scores: Scores, live: set[fx.Node]) -> _Weights | Unread:
    here, interior, dropout, grouped, sinks = softmax, [softmax], 0.0, False, scores.sinks is not None
    while True:
        users = [user for user in here.users if user in live]
        if len(users) != 1:
            by = " and ".join(op_name(user) for user in users) or "nothing"
            return Unread(f"the attention weights are used by {by}, not only by a product with the values")
        (user,) = users
        name = kind(user)
        if name in PRODUCTS:
            return _output(user, here, dropout, grouped, tuple(interior), sinks)
        if name == "dropout":
            dropout = _dropped(user)
        elif name in ("view", "reshape", "flatten", "unflatten"):
            grouped = True
            if not same_sizes((shape(user) or ())[-2:], (shape(here) or ())[-2:]):
                return Unread(f"{op_name(user)} changes rows or columns of the attention weights")
        elif sinks and _drops_last_column(user):
            sinks = False
        elif name not in KEPT or user.args[:1] != (here,):
            return Unread(f"{op_name(user)} between the softmax and the product with the values")
        interior.append(user)
        here = user


def _output(
    node: fx.Node, weights: fx.Node, dropout: float | fx.Node, grouped: bool, interior: tuple[fx.Node, ...], sinks: bool
) -> _Weights | Unread:
    operands = list(node.args)
    if sinks:
        return Unread("the column of sinks is multiplied with the values too")
    if kind(node) == "einsum":
        if not same_equation(operands.pop(0), "bhqk,bhkd->bhqd"):
            return Unread(f"einsum {node.args[0]!r} is not 'bhqk,bhkd->bhqd'")
    elif kind(node) == "baddbmm":
        return Unread("baddbmm adds something to the output")
    left, right = (*operands, node.kwargs.get("other", node.kwargs.get("mat2")))[:2]
    if left is not weights or not isinstance(right, fx.Node) or right is weights:
        return Unread(f"the attention weights are not the left operand of {op_name(node)}")
    if len(shape(right) or ()) != len(shape(weights) or ()):
        return Unread(f"values {tuple(shape(right) or ())} have not the attention weights' rank")
    return _Weights(node, right, dropout, grouped or len(shape(node) or ()) == 3, interior)


def _dropped(node: fx.Node) -> float | fx.Node:
    """The share that dropout drops: 0 when it is not training."""
    given = arguments(node, "self", "p", "training")
    training, share = given.get("training", given.get("train", True)), given.get("p", 0.5)
    return 0.0 if training is False else share


def _drops_last_column(node: fx.Node) -> bool:
    """`weights[..., :-1]`, in Python's and ATen's spelling."""
    if kind(node) == "slice":
        given = arguments(node, "self", "dim", "start", "end", "step")
        rank = len(shape(node) or ())
        return given.get("dim") in (-1, rank - 1) and not given.get("start") and given.get("end") == -1
    index = node.args[1] if kind(node) == "getitem" else None
    if not isinstance(index, tuple) or index[-1] != slice(None, -1):
        return False
    whole = all(part is Ellipsis or part == slice(None) for part in index[:-1])
    return whole and (Ellipsis in index or len(index) == len(shape(node) or ()))


def _between_products(softmax: fx.Node) -> tuple[fx.Node, ...]:
    """What a softmax is computed from and what is computed from it, as far as the nearest products, these included."""
    seen: dict[fx.Node, None] = {}
    for neighbours in (lambda node: node.all_input_nodes, lambda node: node.users):
        stack = [softmax]
        while stack:
            here = stack.pop()
            if here.op in ("call_function", "call_method") and (here not in seen or here is softmax):
                seen[here] = None
                stack += () if kind(here) in PRODUCTS else neighbours(here)
    return tuple(seen)
