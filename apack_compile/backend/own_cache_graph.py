"""A compiled graph over static buffers, with two forms: the dense one, as it came, and the packed one.

The packed form appends to packed state and attends to it (passes/buffers/pack_buffers.py). Which one runs is decided at each call, by
where the call writes and by what is held.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from apack_compile.backend.own_cache import OwnCaches
from apack_compile.passes import BufferPair, FuseAttend, PackBuffers, RemoveDeadCode, run_passes
from apack_compile.passes.buffers.ahead import index_graph
from apack_compile.passes.buffers.pack_buffers import read_besides


class OwnCacheGraph:
    """One compiled graph over static buffers: at each call its dense or its packed form.

    compile: from a graph module to a callable; each form is compiled when it is first needed.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        pairs: Sequence[BufferPair],
        caches: OwnCaches,
        compile: Callable[[fx.GraphModule], Callable[..., Any]],
        dump_dir: str | None = None,
    ) -> None:
        self.gm, self.caches, self.compile, self.dump_dir = gm, caches, compile, dump_dir
        inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        self.inputs = inputs
        self.buffers = [[state_reader(gm, s.state, inputs) for s in (pair.key, pair.value)] for pair in pairs]
        self.layouts = [(pair.key.layout, pair.value.layout) for pair in pairs]
        self.others = [state_reader(gm, node, inputs) for node in read_besides(gm.graph, pairs)]
        self.positions = fx.GraphModule(gm, index_graph(gm.graph, pairs))
        self.dense: Callable[..., Any] | None = None
        self.packed: dict[tuple, tuple[list[int], Callable[..., Any]]] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the graph on the inputs it was traced with."""
        for read in self.others:
            self.caches.check_dense(read(args))
        found = None
        if self.buffers:
            pairs = [(key(args), value(args)) for key, value in self.buffers]
            with torch.no_grad():
                weights = partial(self._weights, args)
                found = self.caches.before(pairs, self.layouts, self.positions(*args), weights)
        if found is None:
            if self.dense is None:
                self.dense = self.compile(self._copy())
            return self.dense(*args)
        layouts = tuple(packed.layout for packed in found)
        if layouts not in self.packed:
            self.packed[layouts] = self._packed_form(layouts)
        kept, run = self.packed[layouts]
        return run(*(args[i] for i in kept), *itertools.chain.from_iterable(packed.state for packed in found))

    def _weights(self, args: Sequence[Any]) -> list[Tensor]:
        """The graph's parameters, which are among a call's inputs or the graph's own."""
        return [*(x for x in args if isinstance(x, nn.Parameter)), *self.gm.parameters()]

    def _copy(self) -> fx.GraphModule:
        """The graph as it came, in a module of an ordinary kind: Dynamo does not trace its own."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.gm.graph, {}))
        return fx.GraphModule(self.gm, graph)

    def _packed_form(self, layouts: tuple[tuple[int, ...], ...]) -> tuple[list[int], Callable[..., Any]]:
        """The packed form for states of these layouts, and which of the graph's own inputs it takes."""
        gm = self._copy()
        passes = (PackBuffers(layouts), FuseAttend(), RemoveDeadCode())
        record = run_passes(gm, passes, self.dump_dir)
        assert not record.left, record.left
        left = {node.name for node in gm.graph.nodes if node.op == "placeholder"}
        return [i for i, name in enumerate(self.inputs) if name in left], self.compile(gm)


def state_reader(gm: fx.GraphModule, state: fx.Node, inputs: Sequence[str]) -> Callable[[Sequence[Any]], Tensor]:
    """What takes a buffer from a call's inputs, or from the module that the graph belongs to."""
    if state.op == "placeholder":
        at = inputs.index(state.name)
        return lambda args: args[at]
    *path, name = str(state.target).split(".")
    owner = gm.get_submodule(".".join(path))
    return lambda args: getattr(owner, name)
