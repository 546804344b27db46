"""Put packed state in the place of a graph's cache buffers: `append_at` and `attend` instead of writes and dense attention."""

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from apack_compile.export.find import OwnedCache, example_tokens
from apack_compile.export.state import (
    BASES,
    CODES,
    CURSOR,
    FIRST,
    NO_CODES,
    POSITIONS,
    ROOT,
    TAIL,
    TURNS,
    CachePlan,
    empty_cache,
    slot_positions,
    slots_key,
)
from apack_compile.export.streams import Span, Stream
from apack_compile.passes.components import deinterleaved_node
from apack_compile.passes.effects import live_nodes
from apack_compile.passes.fuse_attend import FuseAttend
from apack_compile.passes.nodes import op_name, same_sizes, shape, value_of
from apack_compile.passes.sites import AttentionSite, find_sites

CONTIGUOUS = (0, 1, 2, 3)


def rewrite(gm: fx.GraphModule, caches: Sequence[OwnedCache], plans: Mapping[int, CachePlan]) -> dict[int, str]:
    """Pack the caches of `gm` in place; the reasons of those whose attention cannot read packed state, by number.

    With a reason the graph is unfit for use: it was rewritten half. Raises ValueError for a program that is packed already.
    """
    if hasattr(gm, ROOT):
        raise ValueError("program: has a packed cache already; optimize the program that it was made of")
    buffers, slots, unpacked = Buffers(gm), SlotsOf(gm), {}
    for cache in caches:
        plan, key, value = plans[cache.number], _view(gm, cache.key), _view(gm, cache.value)
        own = f"{ROOT}.{_free_name(gm, cache.name)}"
        gm.add_submodule(own, empty_cache(key, value, plan))
        unpacked[_unpack(buffers, cache, plan, own, slots.name(key, plan))] = cache
    reasons = _fuse(gm, unpacked)
    _drop(gm, caches)
    gm.graph.lint()
    gm.recompile()
    return reasons


def _free_name(gm: fx.GraphModule, layer: str) -> str:
    """Where a layer's packed state can be: under its own path, with a number where one attention of it is there already."""
    path, taken = re.sub(r"[^\w.]", "_", layer), {name for name, _ in gm.named_modules()}
    names = (path if i == 0 else f"{path}_{i}" for i in itertools.count())
    return next(name for name in names if f"{ROOT}.{name}" not in taken)


class SlotsOf:
    """Positions and turns of slots, once for all caches that agree on them."""

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


def _view(gm: fx.GraphModule, stream: Stream) -> Tensor:
    """The buffer as `[B, H_kv, T, D]`."""
    return gm.get_buffer(stream.buffer).permute(stream.layout)


class Buffers:
    """Nodes that read buffers of a module; those of one buffer have one recorded value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.values: dict[str, Tensor] = {}

    def read(self, where: str, names: Sequence[str]) -> list[fx.Node]:
        """Nodes of the buffers `where.name`, at the graph's insertion point."""
        return [self._read(self.gm.get_submodule(where), f"{where}.{name}", name) for name in names]

    def _read(self, held: Any, path: str, name: str) -> fx.Node:
        graph, empty = self.gm.graph, held.empty.get(name)
        if empty is None:
            node = graph.get_attr(path)
            self.values.setdefault(path, torch.empty_like(held.get_buffer(name), device="meta"))
        else:
            options = {"dtype": empty.dtype, "device": empty.device}
            node = graph.call_function(torch.ops.aten.empty.memory_format, (list(empty.shape),), options)
            self.values.setdefault(path, empty.to("meta"))
        node.meta["val"] = self.values[path]
        return node


def _unpack(buffers: Buffers, cache: OwnedCache, plan: CachePlan, own: str, shared: str) -> fx.Node:
    """Append and unpack behind the later write; what read the buffers reads what is unpacked."""
    graph = buffers.gm.graph
    with graph.inserting_after(cache.last):
        anchor = graph.call_function(operator.add, (0, 0))
    with graph.inserting_before(anchor):
        key, value, index = new_tokens(graph, cache)
        first, tail, codes, bases, none = (buffers.read(own, names) for names in (FIRST, TAIL, CODES, BASES, NO_CODES))
        (cursor,), positions = buffers.read(own, [CURSOR]), buffers.read(shared, POSITIONS)
        turns = [] if plan.turn is None else buffers.read(shared, TURNS)
        turned = {} if plan.turn is None else {"block": plan.turn.block}
        pairs = 0 if plan.turn is None else plan.turn.interleaved_pairs
        key = deinterleaved_node(graph, key, pairs)
        appended = {**turned, "text_turns": turns[1]} if turns else {}
        arguments = (key, value, index, first, [*tail, *codes], bases, plan.bands, cursor)
        graph.call_function(torch.ops.apack.append_at.default, arguments, appended)
        state = ([*first, *tail], [*none, *codes], [*bases, *bases], plan.bands * 2, positions, cursor)
        read = {**turned, "turns": turns, "interleaved_pairs": pairs} if turns else {}
        unpack = graph.call_function(torch.ops.apack.unpack.default, (key, value, *state, cache.key.size[2]), read)
        streams = (cache.key, cache.value)
        tokens = []
        for i, stream in enumerate(streams):
            token = graph.call_function(operator.getitem, (unpack, i))
            token.meta["val"] = example_tokens(stream)
            tokens.append(token)
        unpack.meta |= {"val": tuple(token.meta["val"] for token in tokens)}
        unpack.meta |= {k: v for k, v in cache.last.meta.items() if k == "nn_module_stack"}
        replaced = [
            (reader, node, permuted(graph, token, dims))
            for stream, token in zip(streams, tokens, strict=True)
            for reader, node, dims in stream.readers
        ]
    for node in reversed(cache.moved):
        anchor.append(node)
    for reader, node, by in replaced:
        reader.replace_input_with(node, by)
    graph.erase_node(anchor)
    return unpack


def new_tokens(graph: fx.Graph, cache: OwnedCache) -> tuple[fx.Node, fx.Node, fx.Node]:
    """New keys and values `[B, H_kv, n, D]` and their positions `[n]`, at the graph's insertion point."""
    key, value = (permuted(graph, _four(graph, stream.new), stream.order) for stream in (cache.key, cache.value))
    index = cache.key.index
    if isinstance(index, Span):
        count = graph.call_function(torch.ops.aten.sym_size.int, (key, 2))
        device = cache.key.tensor.device
        steps = graph.call_function(torch.ops.aten.arange.default, (count,), {"dtype": torch.int64, "device": device})
        index = graph.call_function(torch.ops.aten.add.Tensor, (steps, index.start))
    return key, value, index


def _four(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A tensor with the leading dimensions of 1 that it lacks to be 4-D."""
    for _ in range(4 - len(shape(node) or ())):
        value = value_of(node)
        node = graph.call_function(torch.ops.aten.unsqueeze.default, (node, 0))
        node.meta["val"] = value.unsqueeze(0)
    return node


def permuted(graph: fx.Graph, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """A 4-D tensor with its dimensions in another order."""
    if order == CONTIGUOUS:
        return node
    turned = graph.call_function(torch.ops.aten.permute.default, (node, list(order)))
    turned.meta["val"] = value_of(node).permute(order)
    return turned


def _fuse(gm: fx.GraphModule, unpacked: Mapping[fx.Node, OwnedCache]) -> dict[int, str]:
    """Attentions over unpacked tokens attend to the packed state; why the others cannot."""
    found = find_sites(gm.graph)
    sites = [match for match in found if isinstance(match, AttentionSite)]
    refused = {match.node: match.reason for match in found if not isinstance(match, AttentionSite)}
    reasons: dict[int, str] = {}
    for node, cache in unpacked.items():
        why = next((refused[attention] for attention in (*cache.attentions, node) if attention in refused), None)
        if why is None and all(site.unpack is not node for site in sites):
            why = "no attention over it was found"
        if why is not None:
            reasons[cache.number] = why
    FuseAttend().rewrite(gm.graph, sites)
    for node in gm.graph.nodes:
        if op_name(node) == "apack::attend" and _heads_inside(node):
            _put_heads_inside(gm.graph, node)
    return reasons


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


def _drop(gm: fx.GraphModule, caches: Sequence[OwnedCache]) -> None:
    """Erase the writes and what is dead without them, and the buffers."""
    for cache in caches:
        for stream in (cache.key, cache.value):
            for node in (*stream.leftover, stream.write):
                if not node.users:
                    gm.graph.erase_node(node)
    live = live_nodes(gm.graph)
    for node in reversed(gm.graph.nodes):
        if node not in live and node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    for cache in caches:
        for path in (*cache.key.names, *cache.value.names):
            owner, _, name = path.rpartition(".")
            delattr(gm.get_submodule(owner), name)
