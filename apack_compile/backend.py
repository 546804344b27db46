"""The `torch.compile` backend: rewrite packed-cache attention in a Dynamo graph, then call an ordinary compiler.

Torch finds it by name through the entry point group `torch_dynamo_backends`; registering it here too would be an error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from apack_compile.passes import FindCacheUpdates, FuseAttend, GraphRecord, RemoveDeadCode, run_passes
from apack_compile.passes.nodes import bind, default_overload
from apack_compile.passes.origin import is_unpack

INNER = ("inductor", "aot_eager", "eager")
OPTIONS = ("inner", "strict", "dump_dir")
PASSES = (FuseAttend(), FindCacheUpdates(), RemoveDeadCode())

OnGraph = Callable[[GraphRecord], object]


class StrictError(RuntimeError):
    """A graph still unpacks a packed cache, with strict=True or where the cache has tiers."""


@dataclass(frozen=True)
class BackendOptions:
    """Checked options of the backend."""

    inner: str = "inductor"
    strict: bool = False
    dump_dir: str | None = None

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise ValueError(f"option inner={self.inner!r}: expected one of {', '.join(INNER)}")
        if not isinstance(self.strict, bool):
            raise ValueError(f"option strict={self.strict!r}: expected one of True, False")
        if not isinstance(self.dump_dir, (str, type(None))):
            raise ValueError(f"option dump_dir={self.dump_dir!r}: expected a path as str, or None")

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
    """Compile a Dynamo graph; `options` are inner, strict and dump_dir, `mode` is Inductor's."""
    chosen = BackendOptions.of(options)
    patches = _inductor_patches(chosen.inner, mode)
    record = run_passes(gm, PASSES, chosen.dump_dir)
    if on_graph is not None:
        on_graph(record)
    if record.left and (chosen.strict or reads_tiers(gm)):
        lines = [f"  {site.layer or site.node}: {site.reason}" for site in record.left]
        why = "strict=True" if chosen.strict else "only attend_tiers reads a cache with tiers right"
        raise StrictError(f"{why}, but a packed cache is still unpacked at\n" + "\n".join(lines))
    return _compile(gm, example_inputs, chosen.inner, patches)


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
