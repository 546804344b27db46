"""Pairs of static buffers, for keys and values, that a graph writes new tokens into and that attention alone may read.

One walk for both kinds of graphs: Dynamo's, which write inputs in place, and those of programs, which write buffers in place or give
them back changed. They differ in whose tensors a graph may keep packed and in which positions it may write at: `Rules`. What a
pair's own nodes say is checked here; whether the attentions over it can be rewritten is tried in packed_state.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from apack_compile.passes.attention.attention import Attention, find_attentions
from apack_compile.passes.base import MatchRecord, Refusal
from apack_compile.passes.buffers.cache_updates import CacheUpdate, root_of, updates_of
from apack_compile.passes.buffers.positions import Counted, counted, same_positions
from apack_compile.passes.buffers.writes import Span, read_write
from apack_compile.passes.graph.effects import is_pure, live_nodes, written
from apack_compile.passes.graph.memory import Memory, shares_memory
from apack_compile.passes.graph.nodes import kind, layer_path, op_name, same_sizes, value_of
from apack_compile.passes.graph.views import view_of

Dims = tuple[int, ...]
Reader = tuple[fx.Node, fx.Node, Dims]


@dataclass(frozen=True)
class Rules:
    """What else must hold in one kind of graph: of a buffer, and of positions; each says why it does not."""

    why_not_buffer: Callable[[fx.Node], str | None]
    why_not_positions: Callable[["BufferStream", Counted], str | None]


@dataclass(frozen=True)
class BufferStream:
    """K or V of a pair: the buffer `state`, and the one `write` of `new` tokens into it, at the positions `index`.

    count: new tokens. layout: the buffer's dimensions as `[B, H_kv, T, D]`; order: those of `new` as `[B, H_kv, n, D]`, leading ones of
    1 added. readers: what reads the buffer after the write, the node that it reads, and that node's dimensions in the unpacked tokens.
    copies: what puts the result of a write that is not in place back into the buffer.
    """

    state: fx.Node
    write: fx.Node
    kind: str
    new: fx.Node
    index: fx.Node | Span
    count: int | torch.SymInt
    layout: Dims
    order: Dims
    readers: tuple[Reader, ...]
    copies: tuple[fx.Node, ...]

    @property
    def start(self) -> fx.Node | int:
        """What its positions are, or begin with."""
        return self.index.start if isinstance(self.index, Span) else self.index

    @property
    def size(self) -> Dims:
        """`[B, H_kv, T, D]`."""
        return tuple(value_of(self.state).shape[dim] for dim in self.layout)


@dataclass(frozen=True)
class BufferPair:
    """The static buffers of one layer, both written at the same positions, and the attentions that read them.

    number: its place among the graph's caches. node: the later of the two writes. moved: what reads the one buffer before that, and
    must follow it.
    """

    number: int
    name: str
    attentions: tuple[fx.Node, ...]
    key: BufferStream
    value: BufferStream
    node: fx.Node
    moved: tuple[fx.Node, ...]

    @property
    def writes(self) -> tuple[fx.Node, fx.Node]:
        """The updates of keys and of values."""
        return self.key.write, self.value.write

    def record(self) -> MatchRecord:
        """What a report shows of the pair."""
        details = {
            "kind": self.key.kind,
            "states": [self.key.state.name, self.value.state.name],
            "updates": [write.name for write in self.writes],
            "attentions": [attention.name for attention in self.attentions],
        }
        return MatchRecord(self.node.name, layer_path(self.node), None, True, details)


def find_pairs(graph: fx.Graph, rules: Rules) -> list[BufferPair | Refusal]:
    """Pairs by what their own nodes say, in the order of the attentions, and what is refused."""
    memory, live = Memory.of(graph), live_nodes(graph)
    readers: dict[tuple[fx.Node | None, ...], list[fx.Node]] = {}
    updates: dict[tuple[fx.Node | None, ...], dict[str, CacheUpdate | Refusal | None]] = {}
    for attention in find_attentions(graph, memory):
        if isinstance(attention, Attention):
            found = updates_of(attention, memory)
            writes = tuple(None if update is None else update.node for update in found.values())
            if any(writes):
                readers.setdefault(writes, []).append(attention.node)
                updates.setdefault(writes, found)
    used = Counter(write for writes in updates for write in set(writes))
    pairs: list[BufferPair | Refusal] = []
    for writes, found in updates.items():
        attentions = tuple(readers[writes])
        name = layer_path(attentions[0]) or attentions[0].name
        pair: BufferPair | str = "its keys or values are paired with others in another attention"
        if all(used[write] == 1 for write in writes if write is not None):
            pair = _pair(len(pairs), name, attentions, found, rules, memory, live)
        known = [write for write in writes if write is not None]
        pairs.append(refused(name, pair, known) if isinstance(pair, str) else pair)
    return pairs


def _pair(
    number: int,
    name: str,
    attentions: tuple[fx.Node, ...],
    updates: dict[str, CacheUpdate | Refusal | None],
    rules: Rules,
    memory: Memory,
    live: set[fx.Node],
) -> BufferPair | str:
    streams = []
    for label, update in updates.items():
        if update is None:
            return f"{label} does not come from a cache"
        if isinstance(update, Refusal):
            return update.reason
        stream = _stream(update, rules, memory, live)
        if isinstance(stream, str):
            return f"{label}: {stream}"
        streams.append(stream)
    key, value = streams
    if _name(key.state) == _name(value.state):
        return f"keys and values are one buffer, {_name(key.state)}"
    kept = [value_of(stream.state) for stream in streams]
    # a guard where lengths are symbols: buffers that grow alike are one cache
    if key.size[:3] != value.size[:3] or kept[0].dtype != kept[1].dtype:
        held = [f"{stream.size} {states.dtype}" for stream, states in zip(streams, kept, strict=True)]
        return f"keys {held[0]} and values {held[1]} do not belong together"
    if not same_positions(key.start, value.start) or not same_sizes([key.count], [value.count]):
        return f"keys are written at {key.start}, values at {value.start}"
    first, last = sorted(streams, key=lambda stream: memory.order[stream.write])
    moved = _between(first, last.write, memory, live)
    if isinstance(moved, str):
        return moved
    read = [node for node in (key.start, key.new, value.new) if isinstance(node, fx.Node)]
    changed = memory.write_between(first.write, last.write, read)
    return changed or BufferPair(number, name, attentions, key, value, last.write, moved)


def pairs_of(found: Iterable[BufferPair | Refusal]) -> list[BufferPair]:
    """What was found, less what is refused."""
    return [match for match in found if isinstance(match, BufferPair)]


def refused(name: str, reason: str, writes: Sequence[fx.Node]) -> Refusal:
    """What is no pair, or none that can be packed: the updates `writes` stay."""
    return Refusal(writes[-1], name, reason, False, frozenset(writes), {"updates": [node.name for node in writes]})


def _name(state: fx.Node) -> str:
    """What a reader of a reason knows the buffer by."""
    return str(state.target) if state.op == "get_attr" else state.name


def _stream(update: CacheUpdate, rules: Rules, memory: Memory, live: set[fx.Node]) -> BufferStream | str:
    """The stream of an update, or why its buffer cannot be packed."""
    state, write, name = update.state, update.node, _name(update.state)
    if update.kind.startswith("cat"):
        what = "slides: its oldest tokens leave it" if update.kind == "cat and slice" else "grows by cat"
        return f"{name} {what}, which is no buffer written at positions"
    why, entered, buffer = rules.why_not_buffer(state), read_write(write), value_of(state)
    if why is not None or isinstance(entered, str):
        return why or str(entered)
    if buffer.dim() != 4 or update.token_dim not in (1, 2):
        what = f"{name} {tuple(buffer.shape)} is neither [B, H_kv, T, D] nor [B, T, H_kv, D]"
        return f"{what}, tokens are dimension {update.token_dim}"
    root, dims, _ = root_of(entered.target)
    new = value_of(entered.new)
    if root is not state or sorted(dims) != [0, 1, 2, 3] or new.dim() > 4:
        return f"{op_name(write)} writes through a view of {name} that is not understood"
    if not buffer.dtype.is_floating_point or new.dtype != buffer.dtype:
        return f"{name} is {buffer.dtype}, the tokens written to it are {new.dtype}"
    at, tokens = dims.index(update.token_dim), (*(1,) * (4 - new.dim()), *new.shape)
    others = [i for i in range(4) if i != at]
    if not same_sizes([buffer.shape[dims[i]] for i in others], [tokens[i] for i in others]):
        return f"{op_name(write)} writes tokens {tuple(new.shape)} into {name} {tuple(buffer.shape)}"
    if not entered.fills(tokens[at], at):
        return f"{op_name(write)} does not write one token to each of its positions"
    layout = (0, 3 - update.token_dim, update.token_dim, 3)
    uses = _uses(state, entered.part, write, dims, layout, memory, live)
    if isinstance(uses, str):
        return uses
    order = tuple(dims.index(dim) for dim in layout)
    stream = BufferStream(state, write, update.kind, entered.new, entered.index, tokens[at], layout, order, *uses)
    origin = counted(stream.start, write, memory)
    return origin if isinstance(origin, str) else rules.why_not_positions(stream, origin) or stream


def _uses(
    state: fx.Node,
    part: fx.Node | None,
    write: fx.Node,
    written_dims: Dims,
    layout: Dims,
    memory: Memory,
    live: set[fx.Node],
) -> tuple[tuple[Reader, ...], tuple[fx.Node, ...]] | str:
    """Readers of a buffer after the write, and copies of a new tensor into it; a reason where somebody else has to do with it."""
    order, name, in_place = memory.order, _name(state), bool(written(write))
    inputs = [node for node in order if node.op in ("placeholder", "get_attr") and node.users]
    states = [node for node in inputs if node is state or (node.op == "get_attr" and node.target == state.target)]
    twin = next((node for node in inputs if node not in states and shares_memory(node, state)), None)
    if twin is not None:
        return f"{name} and {_name(twin)} share memory"
    aliases: dict[fx.Node, Dims] = {**dict.fromkeys(states, (0, 1, 2, 3)), write: written_dims}
    sliced = {part, write} if in_place and part is not None else {part}
    stack, readers, copies = list(aliases), list[Reader](), list[fx.Node]()
    while stack:
        node = stack.pop()
        for user in node.users:
            view, is_after = view_of(user), order[user] > order[write]
            filled = kind(user) == "copy" and set(user.users) == {write}
            if user is write or user in aliases or user not in live or (node is part and filled):
                continue
            if node in sliced:
                return f"the slice of {name} that is written is also read by {op_name(user)}"
            if not is_after and view is not None and None not in view.dims and (user is part or not view.narrowed):
                aliases[user] = tuple(aliases[node][dim] for dim in view.dims)  # type: ignore[index]
                stack.append(user)
            elif not in_place and kind(user) == "copy" and user.args[0] in states and user.args[1] is write:
                copies.append(user)
            elif node in written(user):
                return f"{name} is also written by {op_name(user)}"
            elif not is_after or (not in_place and node is not write):
                return f"{name} is read by {op_name(user)} before it is written"
            else:
                readers.append((user, node, tuple(layout.index(dim) for dim in aliases[node])))
    if not in_place and not copies:
        return f"{op_name(write)} makes a new tensor, which is not put back into {name}"
    for writer, targets in memory.writes:
        if writer not in (write, *copies) and any(shares_memory(target, state) for target in targets):
            return f"{name} is also written by {op_name(writer)}"
    return tuple(readers), tuple(copies)


def _between(stream: BufferStream, last: fx.Node, memory: Memory, live: set[fx.Node]) -> tuple[fx.Node, ...] | str:
    """What depends on a stream's write and comes before the other stream's, `last`; why it cannot follow that."""
    order, dependent = memory.order, set[fx.Node]()
    starts = {reader for reader, _, _ in stream.readers}
    for node in order:
        between = order[stream.write] < order[node] < order[last] and node in live
        if between and (node in starts or not dependent.isdisjoint(node.all_input_nodes)):
            if not is_pure(node):
                return f"{op_name(node)} reads {_name(stream.state)} before both buffers are written"
            dependent.add(node)
    if not dependent.isdisjoint(last.all_input_nodes):
        return f"what {op_name(last)} writes depends on {_name(stream.state)}"
    own = {stream.write, *dependent, *(node for _, node, _ in stream.readers)}
    changed = memory.write_between(stream.write, last, {s for node in dependent for s in node.all_input_nodes} - own)
    return changed or tuple(sorted(dependent, key=order.__getitem__))
