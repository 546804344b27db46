"""Pairs of static buffers, for keys and values, that a graph writes new tokens into and that attention alone may read.

What a pair's own nodes say is checked here; whether the attentions over it can be rewritten is tried in pack_buffers.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from apack_compile.passes.base import MatchRecord, Refusal
from apack_compile.passes.cache_updates import CacheUpdate, find_cache_updates
from apack_compile.passes.effects import is_pure, live_nodes
from apack_compile.passes.memory import Memory
from apack_compile.passes.nodes import arguments, kind, op_name, same_sizes, shape, value_of
from apack_compile.passes.update_kinds import KINDS, target_of
from apack_compile.passes.views import entries_of

# Nodes between the graph's inputs and the positions that are written; more is a computation, which would be done twice.
MAX_INDEX_NODES = 16
TOKEN_DIM = 2


@dataclass(frozen=True)
class BufferPair:
    """Keys `[B, H_kv, max_len, D]` and values of one layer, both written at `index` `[n]`, and read by attention alone."""

    key: CacheUpdate
    value: CacheUpdate
    index: fx.Node
    new_key: fx.Node
    new_value: fx.Node
    node: fx.Node

    def record(self) -> MatchRecord:
        """What a report shows of the pair."""
        streams = (self.key, self.value)
        details = {
            "kind": self.key.kind,
            "states": [update.state.name for update in streams],
            "updates": [update.node.name for update in streams],
            "attention": self.key.attention.name,
            "index": self.index.name,
        }
        return MatchRecord(self.node.name, self.key.layer, None, True, details)


def find_pairs(graph: fx.Graph) -> list[BufferPair | Refusal]:
    """Pairs by what their own nodes say, before any attention is tried."""
    memory, live = Memory.of(graph), live_nodes(graph)
    updates = find_cache_updates(graph)
    found: list[BufferPair | Refusal] = [update for update in updates if isinstance(update, Refusal)]
    by_attention: dict[fx.Node, dict[str, CacheUpdate]] = {}
    for update in updates:
        if isinstance(update, CacheUpdate):
            by_attention.setdefault(update.attention, {})[update.stream] = update
    for streams in by_attention.values():
        found.append(_pair(streams, memory, live))
    return found


def _pair(streams: dict[str, CacheUpdate], memory: Memory, live: set[fx.Node]) -> BufferPair | Refusal:
    known = next(iter(streams.values()))
    if len(streams) < 2:
        missing = "value" if "key" in streams else "key"
        return Refusal(known.node, known.layer, f"{missing} comes from no known update of a buffer", False)
    key, value = streams["key"], streams["value"]
    writes: list[tuple[fx.Node, fx.Node]] = []
    for update in (key, value):
        write = _written(update)
        why = write if isinstance(write, str) else _why_not(update, *write, memory, live)
        if why is not None:
            return Refusal(update.node, update.layer, f"{update.stream}: {why}", False)
        assert not isinstance(write, str)
        writes.append(write)
    (index, new_key), (value_index, new_value) = writes
    first, last = sorted((key.node, value.node), key=memory.order.__getitem__)
    why = _differ(key, value) or _not_from_inputs(index, first, last, memory)
    if value_index is not index:
        why = f"keys are written at {index.name}, values at {value_index.name}"
    early = key if key.node is first else value
    for reader in {*early.state.users, *early.node.users} - {first}:
        if memory.order[reader] < memory.order[last] and reader in live:
            why = f"{early.state.name} is read before {last.name} has written the other buffer"
    if why is not None:
        return Refusal(last, key.layer, why, False)
    return BufferPair(key, value, index, new_key, new_value, last)


def _written(update: CacheUpdate) -> tuple[fx.Node, fx.Node] | str:
    """The positions that an update writes at, and the new tokens; or why they are not known."""
    node = update.node
    if not update.in_place:
        return f"{update.kind} makes a new tensor: there is no static buffer"
    if target_of(node) is not update.state:
        return f"{op_name(node)} writes through a view of {update.state.name}"
    if kind(node) == "index_copy":
        given = arguments(node, "self", "dim", "index", "source")
        index, new = given.get("index"), given.get("source")
    elif kind(node) in ("setitem", "index_put"):
        given = arguments(node, "self", "index", "value")
        entries = given.get("index", given.get("indices"))
        if kind(node) == "index_put":
            entries = tuple(slice(None) if entry is None else entry for entry in entries)
        entries = entries_of(entries, 4)
        index, new = entries[update.token_dim], given.get("value", given.get("values"))
    else:
        return f"{update.kind} is none of index_copy, index_put and setitem"
    if not isinstance(index, fx.Node) or len(shape(index) or ()) != 1 or value_of(index).dtype.is_floating_point:
        return f"{op_name(node)} at {index}, which is no tensor of positions"
    if not isinstance(new, fx.Node) or shape(new) is None:
        return f"{op_name(node)} of what is no tensor"
    return index, new


def _why_not(update: CacheUpdate, index: fx.Node, new: fx.Node, memory: Memory, live: set[fx.Node]) -> str | None:
    """Why one buffer cannot be packed."""
    state = update.state
    buffer, tokens = value_of(state), value_of(new)
    if buffer.ndim != 4 or update.token_dim != TOKEN_DIM:
        return f"tokens are dimension {update.token_dim} of {tuple(buffer.shape)}; [B, H_kv, max_len, D] is known"
    if not buffer.dtype.is_floating_point or buffer.requires_grad or isinstance(buffer, torch.nn.Parameter):
        return f"{state.name} is no buffer of floating-point numbers without gradient"
    if tokens.dtype != buffer.dtype:
        return f"new tokens are {tokens.dtype}, {state.name} is {buffer.dtype}"
    if not same_sizes(tokens.shape, (*buffer.shape[:2], shape(index)[0], buffer.shape[3])):
        return f"new tokens {tuple(tokens.shape)} do not fill what is written of {tuple(buffer.shape)}"
    size = buffer.numel() * buffer.dtype.itemsize
    if not buffer.is_contiguous() or not statically_known_true(buffer.untyped_storage().nbytes() == size):
        return f"{state.name} is a view: it has no memory of its own"
    for node in memory.order:
        if node.op in ("placeholder", "get_attr") and node is not state and _share_memory(node, state):
            return f"{state.name} and {node.name} share memory"
    for writer, targets in memory.writes:
        if writer is not update.node and any(_share_memory(target, state) for target in targets):
            return f"{state.name} is also written by {op_name(writer)}"
    early = next((u for u in state.users if memory.order[u] < memory.order[update.node] and u in live), None)
    return None if early is None else f"{state.name} is read by {op_name(early)} before it is written"


def _share_memory(node: fx.Node, state: fx.Node) -> bool:
    """Whether a node is a tensor, a view of it, or something whose memory is not known."""
    value, held = value_of(node), value_of(state)
    if node is state or value is None or held is None:
        return True
    tensors = isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor)
    return tensors and value.untyped_storage()._cdata == held.untyped_storage()._cdata


def _differ(key: CacheUpdate, value: CacheUpdate) -> str | None:
    if key.state is value.state:
        return "keys and values are one buffer"
    keys, values = value_of(key.state), value_of(value.state)
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        return f"keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype} do not belong together"
    return None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack and len(seen) <= MAX_INDEX_NODES:
        here = stack.pop()
        if here not in seen:
            seen.add(here)
            stack += here.all_input_nodes
    return seen


def _not_from_inputs(index: fx.Node, first: fx.Node, last: fx.Node, memory: Memory) -> str | None:
    """Why the positions of a pair's two updates are not known before the graph runs."""
    nodes = _ancestors(index)
    unknown = next((n for n in nodes if n.op not in ("placeholder", "get_attr") and not is_pure(n)), None)
    if len(nodes) > MAX_INDEX_NODES or unknown is not None:
        what = "much is computed" if unknown is None else f"{op_name(unknown)} computes it"
        return f"the positions {index.name} are no graph input: {what}"
    for writer, targets in memory.writes:
        at = memory.order[writer]
        # what the positions are computed of, until they are; the positions themselves, until they are used
        read = nodes if at < memory.order[index] else {index} if at < memory.order[last] else set()
        if writer is not first and any(_share_memory(target, node) for target in targets for node in read):
            return f"the positions {index.name} are written by {op_name(writer)} in the graph"
    return None


def index_graph(graph: fx.Graph, pairs: Iterable[BufferPair]) -> fx.Graph:
    """A graph that takes the same inputs and returns the positions that each pair is written at."""
    pairs = list(pairs)
    needed = {node for pair in pairs for node in _ancestors(pair.index)}
    alone = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = alone.node_copy(node, copies.__getitem__)
    alone.output(tuple(copies[pair.index] for pair in pairs))
    return alone


def read_besides(graph: fx.Graph, pairs: Iterable[BufferPair]) -> list[fx.Node]:
    """Inputs `[B, H, T, D]` that the graph reads and that are no buffer of a pair: where one is packed, its tokens are not there."""
    known = {update.state for pair in pairs for update in (pair.key, pair.value)}
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr") and node not in known]
    return [node for node in inputs if len(shape(node) or ()) == 4 and any(_reads(user, node) for user in node.users)]


def _reads(user: fx.Node, state: fx.Node) -> bool:
    """Whether a node does more than write into a tensor in place."""
    return kind(user) not in KINDS or target_of(user) is not state or user.op == "output" or bool(user.users)
