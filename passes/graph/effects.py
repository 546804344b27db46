"""What a node of a Dynamo graph does besides returning a value: what it writes, and whether it may be dropped.

Order, not edges, carries writes in such a graph: `index_copy_` on a placeholder has no users, and the next read names
the placeholder again. So only what is known to be pure counts as pure; all else is kept and presumed to write.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from apack_compile.passes.graph.nodes import bind, op_name

_OPERATOR_WRITES = {
    operator.setitem, operator.delitem, operator.iadd, operator.iand, operator.iconcat, operator.ifloordiv,
    operator.ilshift, operator.imatmul, operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift,
    operator.isub, operator.itruediv, operator.ixor,
}  # fmt: skip
# Their schemas say nothing of the running statistics they update.
_HIDDEN_WRITES = {"batch_norm", "instance_norm"}
# Higher-order operators that run a graph in another mode.
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
# Methods of a tensor that have no operator of their own name.
_PURE_METHODS = {"bfloat16", "bool", "double", "float", "half", "int", "long", "dim", "numel", "type", "cpu", "cuda"}


def is_pure(node: fx.Node) -> bool:
    """True only for a node that is known to write nothing, draw no random numbers and exist for its value alone."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or node.kwargs.get("out") is not None or _asks_in_place(node):
        return False
    if node.op == "call_function" and (node.target is getattr or _is_operator(node.target)):
        return node.target not in _OPERATOR_WRITES
    if node.op == "call_method" and node.target in _PURE_METHODS:
        return True
    # out= was excluded above; the overload that takes it does not make the whole packet a writer.
    schemas = _not_out(_overloads(node))
    return bool(schemas) and not node.is_impure() and all(_functional(op) for op in schemas)


def is_impure(node: fx.Node) -> bool:
    """The purity test that a dead code elimination of a Dynamo graph needs."""
    return not is_pure(node)


def written(node: fx.Node) -> list[fx.Node]:
    """The argument nodes whose memory the node may write; all of them when nothing better is known."""
    if node.op in ("placeholder", "output") or is_pure(node) or _module_leaves_inputs(node):
        return []
    name = op_name(node)
    inner = _wrapped(node)
    if inner is not None and not any(written(within) for within in inner.nodes):
        return []
    in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    if in_place or (node.op == "call_function" and node.target in _OPERATOR_WRITES):
        first = node.args[0] if node.args else node.kwargs.get("self")
        return _nodes([first, node.kwargs.get("out")])
    overloads = _not_out(_overloads(node))
    if not overloads or _asks_in_place(node):
        return [source for source in node.all_input_nodes if not isinstance(attribute_of(source), fx.GraphModule)]
    if not any(op._schema.is_mutable for op in overloads):
        return _nodes([node.kwargs.get("out")])
    if len(overloads) > 1 or isinstance(node.target, str):
        first_alone = bool(node.args) and all(_writes_first_alone(op) for op in overloads if op._schema.is_mutable)
        return _nodes([node.args[0]]) if first_alone else list(node.all_input_nodes)
    bound, arguments = bind(node, overloads[0]), overloads[0]._schema.arguments
    return _nodes([bound.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write])


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an effect or the graph's output depends on."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if is_impure(node) or any(user in live for user in node.users):
            live.add(node)
    return live


def _module_leaves_inputs(node: fx.Node) -> bool:
    """True for a call of one of torch's own layers, or of the checks that an exported module begins with."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return False
    module = node.graph.owning_module.get_submodule(str(node.target))
    own = type(module).__module__.startswith(("torch.nn.modules.", "torch.export."))
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return own and not hooked and not getattr(module, "inplace", False) and not list(module.children())


def _wrapped(node: fx.Node) -> fx.Graph | None:
    """The graph that an exported `with torch.no_grad():` (or autocast) runs."""
    if not op_name(node).startswith(_WRAPPERS):
        return None
    return next((gm.graph for n in node.all_input_nodes if isinstance(gm := attribute_of(n), fx.GraphModule)), None)


def attribute_of(node: fx.Node) -> Any:
    """What a get_attr node reads, where the graph has a module."""
    found: Any = node.graph.owning_module if node.op == "get_attr" else None
    for part in str(node.target).split(".") if found is not None else ():
        found = getattr(found, part, None)
    return found


def _writes_first_alone(op: torch._ops.OpOverload) -> bool:
    """Whether an operator writes its first argument and no other."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]
    return written[0] and not any(written[1:])


def _is_operator(target: Any) -> bool:
    return getattr(operator, getattr(target, "__name__", ""), None) is target


def _asks_in_place(node: fx.Node) -> bool:
    """True for `torch.nn.functional` functions called with inplace=True, in either spelling."""
    if node.kwargs.get("inplace", False) is not False:
        return True
    if not inspect.isfunction(node.target):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return True
    return bound.arguments.get("inplace", False) is not False


def _functional(op: torch._ops.OpOverload) -> bool:
    returns = len(op._schema.returns) > 0
    return returns and not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags


def _not_out(overloads: list[torch._ops.OpOverload]) -> list[torch._ops.OpOverload]:
    return [op for op in overloads if not any(a.is_out for a in op._schema.arguments)]


def _overloads(node: fx.Node) -> list[torch._ops.OpOverload]:
    """The operators a node may run; empty when it is not known to run registered operators."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return [target]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return list(_of_packet(target))
    name = op_name(node)
    if name in _HIDDEN_WRITES or (node.op == "call_function" and not _is_torch_function(target, name)):
        return []
    packet = getattr(torch.ops.aten, name, None)
    # a name such as __eq__ is an attribute of the namespace itself
    return list(_of_packet(packet)) if isinstance(packet, torch._ops.OpOverloadPacket) else []


def _is_torch_function(target: Callable[..., Any], name: str) -> bool:
    spaces = (torch, torch.nn.functional, torch._C._nn, torch.Tensor)
    return any(getattr(space, name, None) is target for space in spaces)


def _of_packet(packet: torch._ops.OpOverloadPacket) -> Iterator[torch._ops.OpOverload]:
    return (getattr(packet, overload) for overload in packet.overloads())


def _nodes(values: list[Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return found
