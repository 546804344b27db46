"""Put packed state in the place of a graph's cache buffers: `append_at` and `attend` instead of writes and dense attention."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from apack_compile.export.state import (
    POSITIONS,
    ROOT,
    ROTATIONS,
    CachePlan,
    buffer_name,
    empty_cache,
    slot_positions,
    slots_key,
)
from apack_compile.kernels.state import TEXT, Layout, PackedState
from apack_compile.passes.attention.fuse_attend import FuseAttend
from apack_compile.passes.attention.sites import AttentionSite, find_sites
from apack_compile.passes.buffers.packed_state import put_unpack, state_nodes, why_not_fused
from apack_compile.passes.buffers.pairs import BufferPair, BufferStream
from apack_compile.passes.graph.dead_code import erase_dead
from apack_compile.passes.graph.nodes import op_name, same_sizes, value_of


def rewrite(gm: fx.GraphModule, caches: Sequence[BufferPair], plans: Mapping[int, CachePlan]) -> None:
    """Pack the caches of `gm` in place. Raises ValueError for a program that is packed already, RuntimeError where one stays unpacked."""
    if hasattr(gm, ROOT):
        raise ValueError("program: has a packed cache already; optimize the program that it was made of")
    buffers, slots, unpacks = Buffers(gm), SlotsOf(gm), dict[fx.Node, int]()
    erase_dead(gm.graph)
    for cache in caches:
        plan, key, value = plans[cache.number], _view(gm, cache.key), _view(gm, cache.value)
        own = f"{ROOT}.{_free_name(gm, cache.name)}"
        gm.add_submodule(own, empty_cache(key, value, plan))
        with gm.graph.inserting_before(cache.node):
            state = _state(buffers, plan, own, slots.name(key, plan))
        unpacks[put_unpack(gm.graph, cache, state, at_positions=True)] = cache.number
    sites = find_sites(gm.graph)
    refused = why_not_fused(sites, unpacks)
    if refused:
        raise RuntimeError(f"program: caches that could be packed on trial could not in the end: {refused}")
    FuseAttend().rewrite(gm.graph, [site for site in sites if isinstance(site, AttentionSite)])
    for node in gm.graph.nodes:
        if op_name(node) == "apack::attend" and _heads_inside(node):
            _put_heads_inside(gm.graph, node)
    _drop(gm, {str(stream.state.target) for cache in caches for stream in (cache.key, cache.value)})
    gm.graph.lint()
    gm.recompile()


def _free_name(gm: fx.GraphModule, layer: str) -> str:
    """Where a layer's packed state can be: under its own path, with a number where one attention of it is there already."""
    path, taken = re.sub(r"[^\w.]", "_", layer), {name for name, _ in gm.named_modules()}
    names = (path if i == 0 else f"{path}_{i}" for i in itertools.count())
    return next(name for name in names if f"{ROOT}.{name}" not in taken)


class SlotsOf:
    """Positions and rotations of slots, once for all caches that agree on them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.names: dict[tuple, str] = {}

    def name(self, key: Tensor, plan: CachePlan) -> str:
        """Where those for the buffer `[B, H_kv, T, D]` are."""
        alike = slots_key(key.shape[:3], plan, key.device)
        if alike not in self.names:
            self.names[alike] = f"{ROOT}.slots_{len(self.names)}"
            self.gm.add_submodule(self.names[alike], slot_positions(key, plan))
        return self.names[alike]


def _view(gm: fx.GraphModule, stream: BufferStream) -> Tensor:
    """The buffer as `[B, H_kv, T, D]`."""
    return gm.get_buffer(str(stream.state.target)).permute(stream.layout)


class Buffers:
    """Nodes that read buffers of a module; those of one buffer have one recorded value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.values: dict[str, Tensor] = {}

    def read(self, where: str, name: str) -> fx.Node:
        """The node of the buffer `where.name`, at the graph's insertion point."""
        held: Any = self.gm.get_submodule(where)
        path, graph, empty = f"{where}.{name}", self.gm.graph, held.empty.get(name)
        if empty is None:
            node = graph.get_attr(path)
            self.values.setdefault(path, torch.empty_like(held.get_buffer(name), device="meta"))
        else:
            options = {"dtype": empty.dtype, "device": empty.device}
            node = graph.call_function(torch.ops.aten.empty.memory_format, (list(empty.shape),), options)
            self.values.setdefault(path, empty.to("meta"))
        node.meta["val"] = self.values[path]
        return node


def _state(buffers: Buffers, plan: CachePlan, own: str, shared: str) -> PackedState:
    """The packed state of a cache as nodes, at the graph's insertion point."""
    rotation = plan.rotation
    shared_names = (*POSITIONS, *ROTATIONS)
    layout = Layout(
        (TEXT,),
        ((plan.streams[0].bands, plan.streams[1].bands),),
        0 if rotation is None else rotation.block,
        0 if rotation is None else rotation.interleaved_pairs,
    )

    def read(name: str) -> fx.Node:
        name = buffer_name(name)
        return buffers.read(shared if name in shared_names else own, name)

    return state_nodes(layout, read)


def _heads_inside(node: fx.Node) -> bool:
    """Whether what stood in a node's place had the memory of `[B, rows, H, D]`: tracing may have dropped a `contiguous` for it."""
    value = value_of(node)
    _, heads, rows, width = value.shape
    return same_sizes(value.stride()[1:], (width, heads * width, 1)) and not same_sizes((rows,), (1,))


def _put_heads_inside(graph: fx.Graph, node: fx.Node) -> None:
    users = list(node.users)
    with graph.inserting_after(node):
        inside = graph.call_function(torch.ops.aten.transpose.int, (node, 1, 2))
    with graph.inserting_after(inside):
        kept = graph.call_function(torch.ops.aten.contiguous.default, (inside,))
    with graph.inserting_after(kept):
        out = graph.call_function(torch.ops.aten.transpose.int, (kept, 1, 2))
    out.meta["val"] = value_of(node)
    for user in users:
        user.replace_input_with(node, out)


def _drop(gm: fx.GraphModule, names: Collection[str]) -> None:
    """Erase what is dead without the writes, and the buffers, under all of their names."""
    erase_dead(gm.graph)
    buffers = dict(gm.named_buffers(remove_duplicate=False))
    memory = {buffers[name].untyped_storage()._cdata for name in names}
    for path, buffer in buffers.items():
        if buffer.untyped_storage()._cdata in memory:
            owner, _, name = path.rpartition(".")
            delattr(gm.get_submodule(owner), name)
