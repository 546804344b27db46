"""Let a graph attend to packed state in place of a pair of static buffers that it writes new tokens into.

The update of both buffers becomes `apack::append`, what reads them `apack::unpack`; `FuseAttend` then makes one `apack::attend` of
unpack and attention. A pair for which it would not is refused with its reason, so that nothing is unpacked at every step. The state
comes in through further graph inputs: packing anew changes no graph.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from apack_compile.passes.base import MatchRecord, Pass, Refusal
from apack_compile.passes.cache_updates import CacheUpdate, find_cache_updates
from apack_compile.passes.effects import is_pure, live_nodes
from apack_compile.passes.memory import Memory
from apack_compile.passes.nodes import arguments, kind, op_name, same_sizes, shape, value_of
from apack_compile.passes.sites import AttentionSite, find_sites
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


@dataclass(frozen=True)
class StateLayout:
    """How many tensors a packed layer has of each kind, in the order in which the graph takes them.

    segments: packed ones; turns: whether keys are turned back, `block` slots at a time.
    """

    segments: int = 2
    turns: bool = False
    block: int = 0

    @property
    def counts(self) -> tuple[int, int, int, int, int, int]:
        """Tensors of dense, codes, bases, positions, cursor and turns."""
        n = self.segments
        return 4, 4 * n, 6 * n, 1 + n, 1, n if self.turns else 0


@dataclass(frozen=True)
class PackBuffers(Pass):
    """Put append and unpack in the place of pairs of static buffers; bands: of each pair, in the graph's order, once known."""

    layout: StateLayout = StateLayout()
    bands: tuple[tuple[int, ...], ...] = ()

    uses: ClassVar[tuple[str, ...]] = tuple(
        f"apack_compile.passes.{name}"
        for name in ("attention", "cache_updates", "effects", "memory", "nodes", "origin", "sites", "update_kinds")
    )

    def match(self, graph: fx.Graph) -> list[BufferPair | Refusal]:
        """The graph's pairs, and what is refused."""
        found = _pairs(graph)
        pairs = [pair for pair in found if isinstance(pair, BufferPair)]
        reasons: dict[fx.Node, str] = {}
        while True:
            again = self._refused_sites(graph, [pair for pair in pairs if pair.node not in reasons])
            if not again:
                break
            reasons |= again
        return [
            Refusal(m.node, m.key.layer, reasons[m.node], False) if isinstance(m, BufferPair) and m.node in reasons else m
            for m in found
        ]

    def rewrite(self, graph: fx.Graph, matches: Sequence[BufferPair]) -> int:
        """Rewrite the pairs; their state comes in through new inputs, behind the graph's own."""
        for i, pair in enumerate(matches):
            bands = list(self.bands[i]) if self.bands else [0] * (8 * self.layout.segments)
            self._rewrite_pair(graph, pair, f"packed_{i}", bands)
        return len(matches)

    def _refused_sites(self, graph: fx.Graph, pairs: list[BufferPair]) -> dict[fx.Node, str]:
        """Which pairs would still be unpacked, tried on a copy of the graph, and why."""
        trial = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        trial.output(trial.graph_copy(graph, copies))
        unpacks = {}
        for i, pair in enumerate(pairs):
            unpack = self._rewrite_pair(trial, _copied(pair, copies), f"packed_{i}", [0] * (8 * self.layout.segments))
            unpacks[unpack] = pair.node
        reasons, fused = {}, set()
        for site in find_sites(trial):
            if isinstance(site, AttentionSite):
                fused.add(site.unpack)
            elif site.packed:
                for unpack in _unpacks_behind(site, unpacks):
                    reasons[unpacks[unpack]] = site.reason
        for unpack, node in unpacks.items():
            if unpack not in fused:
                reasons.setdefault(node, "no attention reads it that could be rewritten")
        return reasons

    def _rewrite_pair(self, graph: fx.Graph, pair: BufferPair, name: str, bands: list[int]) -> fx.Node:
        """Rewrite one pair; its unpack."""
        states = [update.state for update in (pair.key, pair.value)]
        dense, codes, bases, positions, (cursor,), turns = self._inputs(graph, name, value_of(states[0]))
        new = (pair.new_key, pair.new_value)
        turned: dict[str, Any] = {"block": self.layout.block} if turns else {}
        with graph.inserting_before(pair.node):
            append = graph.call_function(
                torch.ops.apack.append.default,
                (*new, dense[2:] + codes[-4:], bases[-6:], bands[-8:], cursor),
                {"text_turns": turns[-1], **turned} if turns else {},
            )
            unpack = graph.call_function(
                torch.ops.apack.unpack.default,
                # FuseAttend takes it away: its length is never asked for
                (*new, dense, codes, bases, bands, positions, cursor, 0),
                {"turns": turns, **turned} if turns else {},
            )
            read = [graph.call_function(operator.getitem, (unpack, i)) for i in range(2)]
        for node in (append, unpack, *read):
            node.meta["nn_module_stack"] = pair.node.meta.get("nn_module_stack")
        unpack.meta["example_value"] = tuple(value_of(state) for state in states)
        for update, state, node in zip((pair.key, pair.value), states, read, strict=True):
            node.meta["example_value"] = value_of(state)
            for held in (update.node, state):
                held.replace_all_uses_with(node, delete_user_cb=lambda user, write=update.node: user is not write)
            graph.erase_node(update.node)
            graph.erase_node(state)
        return unpack

    def _inputs(self, graph: fx.Graph, name: str, like: torch.Tensor) -> list[list[fx.Node]]:
        """New graph inputs for the state of one layer, behind the last input."""
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        groups: list[list[fx.Node]] = []
        kinds = ("dense", "codes", "bases", "positions", "cursor", "turns")
        for label, count in zip(kinds, self.layout.counts, strict=True):
            groups.append([])
            for i in range(count):
                with graph.inserting_after(last):
                    last = graph.placeholder(f"{name}_{label}_{i}")
                # Its own memory, which is all that is asked of it.
                last.meta["example_value"] = like.new_empty(0)
                groups[-1].append(last)
        return groups


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


def _copied(pair: BufferPair, copies: dict[fx.Node, fx.Node]) -> BufferPair:
    """The same pair in a copy of its graph."""
    key, value = (
        replace(update, node=copies[update.node], state=copies[update.state]) for update in (pair.key, pair.value)
    )
    nodes = {name: copies[getattr(pair, name)] for name in ("index", "new_key", "new_value", "node")}
    return replace(pair, key=key, value=value, **nodes)


def _unpacks_behind(site: Refusal, unpacks: Iterable[fx.Node]) -> list[fx.Node]:
    """The unpacks that a refused site reads."""
    known, seen, found = set(unpacks), set(), []
    stack = [site.node, *site.covers]
    while stack:
        here = stack.pop()
        if here in known:
            found.append(here)
        elif here not in seen:
            seen.add(here)
            stack += here.all_input_nodes
    return found


def _pairs(graph: fx.Graph) -> list[BufferPair | Refusal]:
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
    writes = [_written(update) for update in (key, value)]
    for update, write in zip((key, value), writes, strict=True):
        why = write if isinstance(write, str) else _why_not(update, *write, memory, live)
        if why is not None:
            return Refusal(update.node, update.layer, f"{update.stream}: {why}", False)
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


def _why_not(
    update: CacheUpdate, index: fx.Node, new: fx.Node, memory: Memory, live: set[fx.Node]
) -> str | None:
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
