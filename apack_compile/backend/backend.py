"""The `torch.compile` backend: rewrite packed-cache attention in a Dynamo graph, then call an ordinary compiler.

Torch finds it by name through the entry point group `torch_dynamo_backends`; registering it here too would be an error.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from apack_compile.backend.graph_log import GraphLog
from apack_compile.backend.inner_compiler import AUTO, NO_COMPILER, resolve_compile
from apack_compile.checks import is_ratio
from apack_compile.config import DEFAULT_RATIO
from apack_compile.errors import StrictError
from apack_compile.kernels.linear.cpu import onednn_is_faster
from apack_compile.passes import (
    BufferPair,
    FindCacheUpdates,
    FuseAttend,
    GraphRecord,
    LinearThroughOneDnn,
    MatchRecord,
    PackBuffers,
    PassRecord,
    RemoveDeadCode,
    ShareHeads,
    run_passes,
)
from apack_compile.passes.attention.origin import is_unpack
from apack_compile.passes.buffers.pack_buffers import read_besides
from apack_compile.passes.buffers.pairs import pairs_of
from apack_compile.passes.graph.nodes import bind, default_overload

if TYPE_CHECKING:
    from apack_compile.backend.own_cache import OwnCaches

INNER = (AUTO, "inductor", "aot_eager", "eager")
OPTIONS = ("inner", "strict", "dump_dir", "log", "own_cache", "ratio", "plan")
LINEAR = (LinearThroughOneDnn(),) if onednn_is_faster() else ()
PASSES = (FuseAttend(), ShareHeads(), FindCacheUpdates(), RemoveDeadCode(), *LINEAR)

# By the id of the options that they keep alive themselves; they go when the last graph, and the log, does.
_CACHES: WeakValueDictionary[int, "OwnCaches"] = WeakValueDictionary()

OnGraph = Callable[[GraphRecord], object]


@dataclass(frozen=True)
class BackendOptions:
    """Checked options of the backend.

    inner: the compiler that the rewritten graph goes to; "auto" is Inductor where it can compile for the graph's device, else "eager",
    with a warning. strict: raise where a packed cache is still unpacked or, with own_cache,
    where a stock cache stays dense. dump_dir: folder for graphs before and after each pass. log: is told about every graph.
    own_cache: pack the static key and value buffers that the compiled module owns, at `ratio` (default 4), or by the saved plan at the
    path `plan`. Raises ValueError naming the option.
    """

    inner: str = AUTO
    strict: bool = False
    dump_dir: str | None = None
    log: GraphLog | None = None
    own_cache: bool = False
    ratio: float | None = None
    plan: str | None = None

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise ValueError(f"option inner={self.inner!r}: expected one of {', '.join(INNER)}")
        for name in ("strict", "own_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"option {name}={getattr(self, name)!r}: expected one of True, False")
        for name in ("dump_dir", "plan"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"option {name}={getattr(self, name)!r}: expected a path as str, or None")
        if not isinstance(self.log, (GraphLog, type(None))):
            raise ValueError(f"option log={self.log!r}: expected an apack_compile.GraphLog, or None")
        for name in ("ratio", "plan"):
            if getattr(self, name) is not None and not self.own_cache:
                raise ValueError(f"option {name}={getattr(self, name)!r}: only with own_cache=True")
        if self.ratio is not None and self.plan is not None:
            raise ValueError(
                f"options ratio={self.ratio!r} and plan={self.plan!r} exclude each other; pass one of them"
            )
        if self.ratio is not None and not is_ratio(self.ratio):
            raise ValueError(f"option ratio={self.ratio!r}: expected a finite number > 1")

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "BackendOptions":
        """From the dict that torch.compile passes on; raises ValueError for an option that does not exist."""
        for name, value in (options or {}).items():
            if name not in OPTIONS:
                raise ValueError(f"unknown option {name}={value!r}: expected one of {', '.join(OPTIONS)}")
        return cls(**(options or {}))


def attentionpack(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    on_graph: OnGraph | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph; `options` are those of BackendOptions, `mode` is Inductor's."""
    chosen = BackendOptions.of(options)
    inner, reason = resolve_compile(chosen.inner, _device_type(example_inputs))
    if chosen.inner == AUTO and inner != "inductor":
        ignored = "" if mode is None else f" and mode={mode!r} is ignored"
        what = f"{NO_COMPILER}; graphs run eagerly{ignored}. Install g++ or clang++, or set CXX to the compiler"
        warnings.warn(f'torch.compile(backend="attentionpack"): {what}', stacklevel=1)
    patches = _inductor_patches("inductor" if chosen.inner == AUTO else inner, mode)
    record = run_passes(gm, PASSES, chosen.dump_dir)
    pairs: list[BufferPair] = []
    if chosen.own_cache:
        caches = _own_caches(options, chosen)
        packing = PackBuffers()
        found = packing.match(gm.graph)
        pairs = pairs_of(found)
        matches = tuple(match.record() for match in found)
        record = GraphRecord((*record.passes, PassRecord(packing.name, len(pairs), matches)))
    for tell in (on_graph, None if chosen.log is None else chosen.log.graphs.append):
        if tell is not None:
            tell(record)
    if chosen.log is not None:
        chosen.log.compilers.append(f"{inner} ({reason})")
    _check(gm, record, chosen)
    if not pairs and not (chosen.own_cache and read_besides(gm.graph, ())):
        return _compile(gm, example_inputs, inner, patches)
    from apack_compile.backend.own_cache_graph import OwnCacheGraph

    # Through Dynamo once more: packed state exists only when the graph runs, and its shapes need guards of their own.
    compile_form = partial(torch.compile, backend=inner, mode=mode if inner == "inductor" else None, fullgraph=True)
    return OwnCacheGraph(gm, pairs, caches, compile_form, chosen.dump_dir)


def _device_type(example_inputs: Sequence[Any]) -> str:
    """The type of device that a graph is for: an accelerator where one of its tensors is on one."""
    types = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)} - {"cpu", "meta"}
    return min(types, default="cpu")


def _check(gm: fx.GraphModule, record: GraphRecord, chosen: BackendOptions) -> None:
    """Raise StrictError for what may not stay as it is."""
    if record.left and (chosen.strict or reads_tiers(gm)):
        why = "strict=True" if chosen.strict else "only attend_tiers reads a cache with tiers right"
        raise StrictError(f"{why}, but a packed cache is still unpacked at\n{_listed(record.left)}")
    dense = [match for match in record.static_buffers if match.reason is not None]
    if dense and chosen.strict:
        raise StrictError(f"strict=True with own_cache, but a stock cache stays dense at\n{_listed(dense)}")


def _listed(matches: Iterable[MatchRecord]) -> str:
    return "\n".join(f"  {match.layer or match.node}: {match.reason}" for match in matches)


def _own_caches(options: Mapping[str, Any] | None, chosen: BackendOptions) -> "OwnCaches":
    """The packed state that all graphs of one torch.compile share: torch passes the same options to the backend for each."""
    # imported here: transformers takes a second to load, and the backend is found by name without it
    from apack_compile.backend.own_cache import OwnCaches
    from apack_compile.plan.plan import Plan

    caches = _CACHES.get(id(options))
    if caches is None:
        plan = None if chosen.plan is None else Plan.load(chosen.plan)
        caches = _CACHES[id(options)] = OwnCaches(chosen.ratio or DEFAULT_RATIO, plan, options)
    if chosen.log is not None and caches not in chosen.log.caches:
        chosen.log.caches.append(caches)
    return caches


def reads_tiers(gm: fx.GraphModule) -> bool:
    """Whether a graph unpacks a cache with tiers."""
    return any(bind(n, default_overload(n))["tiers"] is not None for n in gm.graph.nodes if is_unpack(n))


def make_backend(on_graph: OnGraph | None = None, **options: Any) -> Callable[..., Callable[..., Any]]:
    """The backend with fixed options, telling `on_graph` about every graph.

    A plain function, because transformers deep-copies its CompileConfig and a function is copied as itself.
    """
    BackendOptions.of(options)

    def backend(
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] = options,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        return attentionpack(gm, example_inputs, options=options, mode=mode, on_graph=on_graph)

    return backend


def _inductor_patches(inner: str, mode: str | None) -> dict[str, Any]:
    """Inductor's own settings for a torch.compile mode."""
    if mode is None or mode == "default":
        return {}
    if inner != "inductor":
        raise ValueError(f"mode={mode!r} belongs to inner='inductor', not to inner={inner!r}")
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(modes)}")
    return dict(modes[mode])


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str, patches: dict[str, Any]
) -> Callable[..., Any]:
    """Hand the graph to the inner compiler; imported here, Inductor takes seconds to load."""
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, list(example_inputs), config_patches=patches or None)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(inner)(gm, list(example_inputs))
