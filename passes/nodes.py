"""Reading one node of a Dynamo graph: its operator, its arguments by name, the shape Dynamo recorded for it."""

import re
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def op_name(node: fx.Node) -> str:
    """`apack::unpack` for a registered operator, else the function's or method's own name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def bind(node: fx.Node, op: torch._ops.OpOverload) -> dict[str, Any]:
    """The node's arguments by their names in the operator's schema, defaults filled in."""
    arguments = op._schema.arguments
    named: dict[str, Any] = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named.update(zip((a.name for a in arguments if not a.kwarg_only), node.args, strict=False))
    named.update(node.kwargs)
    return named


def default_overload(node: fx.Node) -> torch._ops.OpOverload:
    """The operator of a node whose target is an operator's packet or overload."""
    return node.target if isinstance(node.target, torch._ops.OpOverload) else node.target.default  # type: ignore[union-attr]


def layer_path(node: fx.Node) -> str | None:
    """`model.layers.3.self_attn`: the module that made the node, None when the graph does not say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = re.sub(r"^L\['self'\]\.?", "", list(stack.values())[-1][0])
    return re.sub(r"(?:\._modules)?\['?(\w+)'?\]", r".\1", path).lstrip(".")


def value_of(node: Any) -> Any:
    """The fake tensor or number that Dynamo recorded for a node; a constant is itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def shape(node: Any) -> torch.Size | None:
    """The shape Dynamo recorded for a node."""
    value = value_of(node)
    return value.shape if isinstance(value, torch.Tensor) else None


def same_sizes(left: Any, right: Any) -> bool:
    """True when two shapes are known to be equal without adding a guard."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))
