"""Which caches of a program can be packed: buffers that one write fills at an input's positions and that attention alone reads."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from apack_compile.export.positions import why_no_position
from apack_compile.export.state import ROOT
from apack_compile.export.streams import Span, Stream, read_stream
from apack_compile.passes.attention import Attention, NoAttention, find_attentions
from apack_compile.passes.base import Refusal
from apack_compile.passes.cache_updates import CacheUpdate, root_of, updates_of
from apack_compile.passes.effects import is_pure, written
from apack_compile.passes.memory import Memory
from apack_compile.passes.nodes import kind, layer_path, op_name
from apack_compile.passes.update_kinds import KINDS, target_of


@dataclass(frozen=True)
class OwnedCache:
    """The cache that `attentions` read; number: its place among the program's caches. last: the later of the two writes.

    moved: what reads keys before values are written, and must follow that write.
    """

    number: int
    name: str
    attentions: tuple[fx.Node, ...]
    key: Stream
    value: Stream
    last: fx.Node
    moved: tuple[fx.Node, ...]


@dataclass(frozen=True)
class LeftCache:
    """A cache that stays dense, and why; `attended` says that an attention was found to read it."""

    number: int
    name: str
    reason: str
    attended: bool = True


def find_caches(gm: fx.GraphModule) -> list[OwnedCache | LeftCache]:
    """Every cache that attention reads, in the order of the attentions, then buffers written like one that none was found to read."""
    memory = Memory.of(gm.graph)
    attentions = find_attentions(gm.graph, memory)
    readers: dict[tuple[fx.Node | None, ...], list[Attention]] = {}
    updates: dict[tuple[fx.Node | None, ...], dict[str, CacheUpdate | Refusal | None]] = {}
    for attention in attentions:
        if isinstance(attention, Attention):
            found = updates_of(attention, memory)
            writes = tuple(None if update is None else update.node for update in found.values())
            if any(writes):
                readers.setdefault(writes, []).append(attention)
                updates.setdefault(writes, found)
    pairs = Counter(write for writes in updates for write in set(writes))
    caches: list[OwnedCache | LeftCache] = []
    for writes, found in updates.items():
        nodes = tuple(attention.node for attention in readers[writes])
        name = layer_path(nodes[0]) or nodes[0].name
        cache: OwnedCache | str = "its keys or values are paired with others in another attention"
        if all(pairs[write] == 1 for write in writes if write is not None):
            cache = _cache(gm, len(caches), name, nodes, found, memory)
        caches.append(LeftCache(len(caches), name, cache) if isinstance(cache, str) else cache)
    known = {root_of(target)[0] for writes in updates for write in writes if write for target in _targets(write)}
    for node, why in _unread(gm, attentions, {str(node.target) for node in known}, memory).items():
        caches.append(LeftCache(len(caches), node, why, attended=False))
    return caches


def drop_checks(graph: fx.Graph) -> None:
    """Erase checks of dtypes that exporting put beside each `to`: they hold, and would count as readers of what they check."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def _targets(write: fx.Node) -> list[fx.Node]:
    """The tensor that an update is of."""
    return [node for node in (target_of(write), *written(write)) if node is not None]


def _unread(
    gm: fx.GraphModule, attentions: list[Attention | NoAttention], known: set[str], memory: Memory
) -> dict[str, str]:
    """Buffers `[B, H_kv, T, D]` that are written, but that no attention was found to read, and why."""
    buffers, found = dict(gm.named_buffers(remove_duplicate=False)), {}
    for write, targets in memory.writes:
        for target in targets:
            root = root_of(target)[0]
            name = str(root.target)
            buffer = buffers.get(name) if root.op == "get_attr" and kind(write) in KINDS else None
            packed = name.startswith(f"{ROOT}.")
            if buffer is None or packed or name in known or buffer.dim() != 4 or not buffer.is_floating_point():
                continue
            later = (
                a.why for a in attentions if isinstance(a, NoAttention) and memory.order[a.node] > memory.order[write]
            )
            found[name] = next(later, "no attention that reads it was found")
    return found


def _cache(
    gm: fx.GraphModule,
    number: int,
    name: str,
    attentions: tuple[fx.Node, ...],
    updates: dict[str, CacheUpdate | Refusal | None],
    memory: Memory,
) -> OwnedCache | str:
    streams = {}
    for stream, update in updates.items():
        if update is None:
            return f"{stream} does not come from a cache"
        if isinstance(update, Refusal):
            return update.reason
        found = read_stream(gm, update, memory)
        if isinstance(found, str):
            return f"{stream}: {found}"
        streams[stream] = found
    key, value = streams["key"], streams["value"]
    if key.buffer == value.buffer:
        return f"key and value share the buffer {key.buffer}"
    if key.size[:3] != value.size[:3]:
        return f"key {key.size} and value {value.size} do not hold the same tokens"
    if not same_positions(key.index, value.index):
        return "key and value are written at positions of different origin"
    where = key.index.start if isinstance(key.index, Span) else key.index
    why = why_no_position(where, key.write, memory)
    if why is not None:
        return why
    first, last = sorted((key, value), key=lambda stream: memory.order[stream.write])
    moved = _between(first, last.write, memory)
    if isinstance(moved, str):
        return moved
    changed = memory.write_between(first.write, last.write, [where, key.new, value.new])
    return changed or OwnedCache(number, name, attentions, key, value, last.write, moved)


def same_positions(left: object, right: object) -> bool:
    """Whether two graph values are the same by how they are computed."""
    if isinstance(left, Span) and isinstance(right, Span):
        return same_positions(left.start, right.start)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return type(left) is type(right) and left == right
    if left is right:
        return True
    if left.op != right.op or left.target != right.target or not is_pure(left) or len(left.args) != len(right.args):
        return False
    return left.kwargs == right.kwargs and all(map(same_positions, left.args, right.args))


def _between(stream: Stream, last: fx.Node, memory: Memory) -> tuple[fx.Node, ...] | str:
    """What depends on a stream's write and comes before the other stream's, `last`; why it cannot follow that."""
    order, dependent = memory.order, set[fx.Node]()
    starts = {reader for reader, _, _ in stream.readers}
    for node in sorted(order, key=order.__getitem__):
        after_one = order[stream.write] < order[node] < order[last]
        if after_one and (node in starts or not dependent.isdisjoint(node.all_input_nodes)):
            if not is_pure(node):
                return f"{op_name(node)} reads {stream.buffer} before both writes are done"
            dependent.add(node)
    if not dependent.isdisjoint(last.all_input_nodes):
        return f"what {op_name(last)} writes depends on {stream.buffer}"
    own = {stream.write, *dependent, *(node for _, node, _ in stream.readers)}
    read = {source for node in dependent for source in node.all_input_nodes} - own
    changed = memory.write_between(stream.write, last, read)
    return changed or tuple(sorted(dependent, key=order.__getitem__))


def example_tokens(stream: Stream) -> torch.Tensor:
    """What `unpack` returns in the stream's place, without data."""
    return torch.empty(stream.size, dtype=stream.tensor.dtype, device="meta")
