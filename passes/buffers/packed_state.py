"""Append and unpack in the place of a pair of static buffers, and whether `FuseAttend` would make attend of it."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import fx

from apack_compile.kernels.format import Bands
from apack_compile.kernels.state import TEXT, Layout, PackedState
from apack_compile.passes.attention.components import deinterleaved_node
from apack_compile.passes.attention.origin import unpacks_read
from apack_compile.passes.attention.sites import AttentionSite, find_sites
from apack_compile.passes.base import Refusal
from apack_compile.passes.buffers.pairs import BufferPair, BufferStream, Dims, pairs_of, refused
from apack_compile.passes.buffers.writes import Span
from apack_compile.passes.graph.dead_code import erase_dead
from apack_compile.passes.graph.nodes import shape, value_of

# What stands for a state whose bands are not known yet.
TEXT_ONLY = Layout((TEXT,), ((Bands(), Bands()),))


def state_nodes(layout: Layout, node_of: Callable[[str], fx.Node]) -> PackedState:
    """A state of nodes: `node_of` makes that of each tensor, by its name, in the operations' order."""
    nodes: Any = [node_of(name) for name in layout.tensor_names()]
    return PackedState.parse(nodes, layout.flatten())


def calls(
    graph: fx.Graph, state: PackedState, key: fx.Node, value: fx.Node, index: fx.Node | None
) -> tuple[fx.Node, fx.Node]:
    """Append of new tokens to a state of nodes, at the positions `index` or behind those held, and unpack."""
    key = deinterleaved_node(graph, key, state.interleaved_pairs)
    flat = state.flatten()
    stores, bases, layout = flat.to_append()
    if index is None:
        append = graph.call_function(torch.ops.apack.append.default, (key, value, stores, bases, layout))
    else:
        arguments = (key, value, index, [state.first.key, state.first.value], stores, bases, layout)
        append = graph.call_function(torch.ops.apack.append_at.default, arguments)
    # FuseAttend takes unpack away: how many tokens it gives is never asked for
    return append, graph.call_function(torch.ops.apack.unpack.default, (key, value, *flat, 0))


def put_unpack(graph: fx.Graph, pair: BufferPair, state: PackedState, at_positions: bool) -> fx.Node:
    """Append and unpack in the place of a pair's writes; its unpack. What read the buffers reads what is unpacked.

    state: nodes in the place of tensors, before the later write. at_positions: append where the graph says and check that, not behind
    the tokens held.
    """
    streams = (pair.key, pair.value)
    with graph.inserting_after(pair.node):
        anchor = graph.call_function(operator.add, (0, 0))
    with graph.inserting_before(anchor):
        key, value = new_tokens(graph, pair)
        index = positions(graph, pair.key, key) if at_positions else None
        append, unpack = calls(graph, state, key, value, index)
        tokens = [graph.call_function(operator.getitem, (unpack, i)) for i in range(2)]
        for node in (append, unpack, *tokens):
            node.meta |= {name: found for name, found in pair.node.meta.items() if name == "nn_module_stack"}
        for node, stream in zip(tokens, streams, strict=True):
            node.meta["val"] = value_of(stream.state).permute(stream.layout)
        unpack.meta["val"] = tuple(node.meta["val"] for node in tokens)
        read = [
            (reader, node, permuted(graph, token, dims))
            for stream, token in zip(streams, tokens, strict=True)
            for reader, node, dims in stream.readers
        ]
    for node in reversed(pair.moved):
        anchor.append(node)
    for reader, node, by in read:
        reader.replace_input_with(node, by)
    for node in (anchor, *(node for stream in streams for node in (*stream.copies, stream.write))):
        graph.erase_node(node)
    return unpack


def new_tokens(graph: fx.Graph, pair: BufferPair) -> tuple[fx.Node, fx.Node]:
    """New keys and values `[B, H_kv, n, D]`, at the graph's insertion point."""
    key, value = (permuted(graph, _four(graph, stream.new), stream.order) for stream in (pair.key, pair.value))
    return key, value


def positions(graph: fx.Graph, stream: BufferStream, new: fx.Node) -> fx.Node:
    """The positions `[n]` of the new tokens `[B, H_kv, n, D]`, at the graph's insertion point."""
    if not isinstance(stream.index, Span):
        return stream.index
    count = graph.call_function(torch.ops.aten.sym_size.int, (new, 2))
    options = {"dtype": torch.int64, "device": value_of(stream.state).device}
    steps = graph.call_function(torch.ops.aten.arange.default, (count,), options)
    return graph.call_function(torch.ops.aten.add.Tensor, (steps, stream.start))


def _four(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A tensor with the leading dimensions of 1 that it lacks to be 4-D."""
    for _ in range(4 - len(shape(node) or ())):
        value = value_of(node)
        node = graph.call_function(torch.ops.aten.unsqueeze.default, (node, 0))
        node.meta["val"] = value.unsqueeze(0)
    return node


def permuted(graph: fx.Graph, node: fx.Node, order: Dims) -> fx.Node:
    """A 4-D tensor with its dimensions in another order."""
    if order == (0, 1, 2, 3):
        return node
    reordered = graph.call_function(torch.ops.aten.permute.default, (node, list(order)))
    reordered.meta["val"] = value_of(node).permute(order)
    return reordered


def attended(graph: fx.Graph, found: Sequence[BufferPair | Refusal]) -> list[BufferPair | Refusal]:
    """What was found, pairs that would still be unpacked refused with their reason: tried on a copy of the graph."""
    tried, reasons = list(found), {0: ""}
    while reasons:
        reasons = _why_not_attended(graph, pairs_of(tried))
        for number, reason in reasons.items():
            pair = tried[number]
            assert isinstance(pair, BufferPair)
            tried[number] = refused(pair.name, reason, pair.writes)
    return tried


def _why_not_attended(graph: fx.Graph, pairs: Iterable[BufferPair]) -> dict[int, str]:
    """Of each pair's number, why no attend would stand in its place."""
    trial = fx.Graph(graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    copies[graph.output_node()] = trial.output(trial.graph_copy(graph, copies))
    erase_dead(trial)
    first, unpacks = next(iter(trial.nodes)), {}
    for pair in pairs:
        with trial.inserting_before(first):
            # its own memory, which is all that is asked of it
            held = trial.placeholder(f"packed_{pair.number}")
        held.meta["val"] = value_of(pair.key.state).new_empty(0)
        nodes: Any = [held] * len(TEXT_ONLY.tensor_names())
        state = PackedState.parse(nodes, TEXT_ONLY.flatten())
        unpacks[put_unpack(trial, _in_copy(pair, copies), state, at_positions=False)] = pair.number
    return why_not_fused(find_sites(trial), unpacks)


def why_not_fused(sites: Iterable[AttentionSite | Refusal], unpacks: Mapping[fx.Node, int]) -> dict[int, str]:
    """Of each pair's number, why its unpack stays: the first reason of an attention that reads it."""
    fused, reasons = set(), dict[int, str]()
    for site in sites:
        if isinstance(site, AttentionSite):
            fused.add(site.unpack)
        elif site.packed:
            for unpack in unpacks_read((site.node, *site.covers)) & unpacks.keys():
                reasons.setdefault(unpacks[unpack], site.reason)
    for unpack, number in unpacks.items():
        if unpack not in fused:
            reasons.setdefault(number, "no attention over it was found")
    return reasons


def _in_copy(value: Any, copies: Mapping[fx.Node, fx.Node]) -> Any:
    """The same match in a copy of its graph."""
    if isinstance(value, fx.Node):
        return copies[value]
    if isinstance(value, tuple):
        return tuple(_in_copy(part, copies) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _in_copy(getattr(value, f.name), copies) for f in fields(value)})
    return value
