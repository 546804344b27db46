"""`optimize` for exported programs and graph modules."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from apack_compile.config import AttentionPackConfig
from apack_compile.errors import StrictError
from apack_compile.export.find import drop_checks, find_caches
from apack_compile.export.observe import Call, calls_of, observe
from apack_compile.export.plans import budget_plans, given_plans
from apack_compile.export.rewrite import rewrite
from apack_compile.passes.base import Refusal
from apack_compile.passes.buffers.pairs import pairs_of
from apack_compile.passes.graph.nodes import value_of
from apack_compile.plan.plan import Plan


def optimize_program(
    program: ExportedProgram | fx.GraphModule,
    ratio: float | None,
    plan: Plan | None,
    calibration_inputs: Any,
    strict: bool,
) -> ExportedProgram | fx.GraphModule:
    """A new program of the same kind whose KV cache buffers are packed state; weights are shared with the given one.

    Raises ValueError where no cache can be packed, where there is neither a plan nor calibration inputs, and for a plan that does
    not fit; StrictError where strict is set and a cache is left dense.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan={plan!r} must be a Plan; Plan.load(path) reads one")
    if plan is None and calibration_inputs is None:
        raise ValueError(
            "calibration_inputs: a program needs them to fit bases to, or a plan with its bases; pass one of them"
        )
    if plan is not None and (calibration_inputs is not None or ratio is not None):
        raise ValueError("plan: excludes ratio and calibration_inputs; pass one of them")
    calls = None if calibration_inputs is None else calls_of(calibration_inputs)
    config = AttentionPackConfig(ratio=ratio) if plan is None else None
    gm = graph_module_of(program, calls[0] if calls else None)
    found, unread = find_caches(gm, tried=True)
    caches = pairs_of(found)
    left = [f"{m.layer}: {m.reason}" for m in found if isinstance(m, Refusal)]
    left += [f"{name}: {reason}" for name, reason in unread.items()]
    if strict and left:
        raise StrictError("strict=True, but a cache stays dense:\n  " + "\n  ".join(left))
    if not caches:
        reasons = "; ".join(left) or "it has no attention over a cache"
        raise ValueError(f"program: none of its caches can be packed ({reasons})")
    if plan is not None:
        plans = given_plans(plan, caches, len(found))
    else:
        watched = copied(gm)
        seen = observe(watched, pairs_of(find_caches(watched, tried=True)[0]), calls, config.ratio)
        plans = budget_plans(seen, caches, config.ratio)
    rewrite(gm, caches, plans)
    return gm if isinstance(program, fx.GraphModule) else exported(gm, program, calls)


def graph_module_of(program: ExportedProgram | fx.GraphModule, call: Call | None) -> fx.GraphModule:
    """The program as a module that shares its weights and has buffers of its own; shapes of all values are recorded."""
    gm = copied(program.module(check_guards=False) if isinstance(program, ExportedProgram) else program)
    if any(value_of(node) is None for node in gm.graph.nodes if node.op == "placeholder"):
        if call is None:
            raise ValueError("program: its graph records no shapes; pass calibration_inputs, or export it")
        record_shapes(gm, call)
    drop_checks(gm.graph)
    return gm


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with the same parameters, and its own graph and buffers."""
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    fleeting = {
        f"{path}.{name}".lstrip(".")
        for path, module in gm.named_modules()
        for name in module._non_persistent_buffers_set
    }
    own: dict[int, nn.Module] = {}
    # one memo: buffers that share memory go on sharing it
    memo: dict[int, Any] = {}
    for path, buffer in list(new.named_buffers(remove_duplicate=False)):
        owner, _, name = path.rpartition(".")
        module = _own_module(new, owner, own)
        module.register_buffer(name, copy.deepcopy(buffer.detach(), memo), persistent=path not in fleeting)
    return new


def _own_module(root: nn.Module, path: str, own: dict[int, nn.Module]) -> nn.Module:
    """The submodule at `path`, with all that lead to it copied once, so that what is registered there stays there."""
    module = root
    for part in path.split(".") if path else ():
        child = getattr(module, part)
        if id(child) not in own:
            twin = copy.copy(child)
            for name in ("_buffers", "_modules", "_parameters", "_non_persistent_buffers_set"):
                setattr(twin, name, copy.copy(getattr(child, name)))
            own[id(child)] = own[id(twin)] = twin
        setattr(module, part, own[id(child)])
        module = own[id(child)]
    return module


class _Shapes(fx.Interpreter):
    """Runs a graph on fake tensors and records each node's value."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def fetch_attr(self, target: str) -> Any:
        found = super().fetch_attr(target)
        return self.mode.from_tensor(found) if isinstance(found, torch.Tensor) else found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


def record_shapes(gm: fx.GraphModule, call: Call) -> None:
    """Record the values of a call's nodes, as torch.export does."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, static_shapes=True)
    args, kwargs = call
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    missing = names[len(args) :]
    if sorted(missing) != sorted(kwargs):
        raise ValueError(
            f"calibration_inputs: {len(args)} arguments and {sorted(kwargs)} must be the program's {names}"
        )
    flat = [*args, *(kwargs[name] for name in missing)]
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in flat]
    with mode, torch.no_grad():
        _Shapes(gm, mode).run(*fakes, enable_io_processing=False)


def exported(gm: fx.GraphModule, program: ExportedProgram, calls: Sequence[Call] | None) -> ExportedProgram:
    """`gm` exported with the inputs and dynamic sizes of `program`."""
    example = program.example_inputs
    if example is None:
        if not calls:
            raise ValueError("program: holds no example inputs; pass calibration_inputs")
        example = calls[0]
    args, kwargs = example
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"][-len(leaves) :]
    dims: dict[Any, Any] = {}
    sizes = [_dynamic(node, program, dims) for node in inputs]
    by_args, by_kwargs = pytree.tree_unflatten(sizes, spec)
    dynamic = (*by_args, *by_kwargs.values())
    return torch.export.export(gm, tuple(args), dict(kwargs), dynamic_shapes=dynamic, strict=False)


def _dynamic(node: fx.Node, program: ExportedProgram, dims: dict[Any, Any]) -> Any:
    """Which sizes of an input are dynamic, with their bounds; one Dim for each symbol."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return None
    found = {}
    for dim, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt):
            symbol = size.node.expr
            bounds = program.range_constraints.get(symbol)
            if bounds is not None and symbol not in dims:
                upper = int(bounds.upper) if math.isfinite(float(bounds.upper)) else None
                dims[symbol] = Dim(f"size_{len(dims)}", min=int(bounds.lower), max=upper)
            # a size computed from others is found again by tracing
            found[dim] = dims.get(symbol, Dim.AUTO)
    return found or None
