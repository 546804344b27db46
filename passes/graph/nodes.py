"""Reading one node of a traced graph: its operator, its arguments by name, the shape recorded for it.

Dynamo's graphs call torch functions and methods and keep values in `example_value`; exported graphs call ATen operators and keep
them in `val`. Both are read alike.
"""

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


_SPELLINGS = {
    "truediv": "div", "true_divide": "div", "divide": "div", "itruediv": "div", "multiply": "mul", "imul": "mul", "rmul": "mul",
    "iadd": "add", "radd": "add", "subtract": "sub", "isub": "sub", "_softmax": "softmax", "_safe_softmax": "softmax",
    "swapaxes": "transpose", "swapdims": "transpose", "concat": "cat", "concatenate": "cat", "_to_copy": "to", "type": "to",
    "type_as": "to", "float": "to", "double": "to", "half": "to", "bfloat16": "to", "_unsafe_view": "view",
}  # fmt: skip


def kind(node: fx.Node) -> str:
    """What the node computes, by one name for all spellings: `add` for `+`, `+=`, `torch.add`, `add_` and `aten.add.Tensor`."""
    name = op_name(node).removeprefix("aten::")
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    name = name.removesuffix("_")
    return _SPELLINGS.get(name, name)


def arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The node's arguments under `names`, whichever were passed by position; missing ones are absent, `input` is `self`."""
    found = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if "input" in found:
        found["self"] = found.pop("input")
    return found


def constant(value: Any) -> float | None:
    """The number that an argument is: itself, or what `torch.full` or `torch.tensor` made of one, rounded to its type; else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return None
    if kind(value) == "full":
        number = constant(arguments(value, "size", "fill_value").get("fill_value"))
    elif kind(value) in ("tensor", "scalar_tensor"):
        number = constant(arguments(value, "data").get("data", value.kwargs.get("s")))
    else:
        return None
    made = value_of(value)
    if number is None or not isinstance(made, torch.Tensor):
        return None
    return float(torch.tensor(number, dtype=made.dtype, device="cpu"))


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
    path = re.sub(r"^L\['(?:self|model)'\]\.?", "", list(stack.values())[-1][0])
    return re.sub(r"(?:\._modules)?\['?(\w+)'?\]", r".\1", path).lstrip(".")


def value_of(node: Any) -> Any:
    """The fake tensor or number that tracing recorded for a node; a constant is itself."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node


def recorded_as(node: fx.Node) -> str:
    """The name in `meta` under which tracing recorded the node's value."""
    return "example_value" if "example_value" in node.meta else "val"


def shape(node: Any) -> torch.Size | None:
    """The shape recorded for a node."""
    value = value_of(node)
    return value.shape if isinstance(value, torch.Tensor) else None


def same_sizes(left: Any, right: Any) -> bool:
    """True when two shapes are known to be equal without adding a guard."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))
