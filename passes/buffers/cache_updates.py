"""Find where a graph puts new tokens into a stock cache that an attention reads: dense buffers, or tensors that grow.

From each attention's key and value the walk goes back through head repetition, transposes, casts and slices to the node that
brought the new tokens in. These caches are listed and stay as they are; only a packed cache is rewritten.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from apack_compile.passes.attention.attention import Attention, find_attentions
from apack_compile.passes.attention.origin import head_repetition
from apack_compile.passes.base import MatchRecord, Pass, Refusal
from apack_compile.passes.buffers.update_kinds import KINDS, along, concatenated, target_of
from apack_compile.passes.graph.effects import is_pure
from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import arguments, kind, layer_path, op_name, same_sizes, shape, value_of
from apack_compile.passes.graph.views import view_of

SAME_NUMBERS = {"to", "contiguous", "clone", "reshape", "expand"}
UNCHANGED = "a stock cache: its bytes are unchanged"


@dataclass(frozen=True)
class CacheUpdate:
    """New tokens of one stream enter `state`, of which `attention` reads the result; token_dim: the dimension that they enter."""

    node: fx.Node
    kind: str
    state: fx.Node
    owner: str
    in_place: bool
    token_dim: int
    stream: str
    attention: fx.Node
    layer: str | None

    def record(self) -> MatchRecord:
        """What a report shows of the update."""
        size = shape(self.state)
        fixed = size is not None and all(isinstance(extent, int) for extent in size)
        details = {
            "kind": self.kind,
            "state": self.state.name,
            "bytes": size.numel() * value_of(self.state).dtype.itemsize if fixed else None,
            "owner": self.owner,
            "in_place": self.in_place,
            "token_dim": self.token_dim,
            "stream": self.stream,
            "attention": self.attention.name,
        }
        return MatchRecord(self.node.name, self.layer, UNCHANGED, False, details)


def find_cache_updates(graph: fx.Graph) -> list[CacheUpdate | Refusal]:
    """The updates of all stock caches that attentions read, and those of unknown kinds, each once."""
    memory = Memory.of(graph)
    found: dict[tuple[fx.Node, str], CacheUpdate | Refusal] = {}
    for attention in find_attentions(graph, memory):
        if isinstance(attention, Attention):
            for stream, update in updates_of(attention, memory).items():
                if update is not None:
                    found.setdefault((update.node, stream), update)
    return list(found.values())


def updates_of(attention: Attention, memory: Memory) -> dict[str, CacheUpdate | Refusal | None]:
    """The update that an attention's key and its value come from; None where no stock cache is behind one."""
    return {
        stream: _update(node, stream, attention.node, memory)
        for stream, node in (("key", attention.key), ("value", attention.value))
    }


@dataclass(frozen=True)
class _Place:
    """Where the walk stands: the node, who reads it, which of its dimensions holds tokens, whether a slice was taken of them."""

    node: fx.Node
    reader: fx.Node
    token_dim: int
    sliced: bool = False


@dataclass(frozen=True)
class _Found:
    """What the walk ended at."""

    node: fx.Node
    kind: str
    state: fx.Node
    in_place: bool
    token_dim: int


@dataclass(frozen=True)
class _Unclear:
    """A write to what the attention reads, that is no known update."""

    node: fx.Node
    why: str


def _update(node: fx.Node, stream: str, attention: fx.Node, memory: Memory) -> CacheUpdate | Refusal | None:
    size = shape(node)
    found = None if size is None else _walk(_Place(node, attention, len(size) - 2), memory)
    if found is None:
        return None
    layer = layer_path(found.node)
    if isinstance(found, _Unclear):
        return Refusal(found.node, layer, f"{stream}: {found.why}", False)
    return CacheUpdate(
        node=found.node,
        kind=found.kind,
        state=found.state,
        owner=owner(found.state),
        in_place=found.in_place,
        token_dim=found.token_dim,
        stream=stream,
        attention=attention,
        layer=layer,
    )


def _walk(start: _Place, memory: Memory) -> _Found | _Unclear | None:
    place: _Place | None = start
    while place is not None:
        writer = memory.last_write(place.node, place.reader)
        if writer is not None:
            return _written(place, writer, memory)
        if kind(place.node) in KINDS:
            return _written(place, place.node, memory)
        parts = concatenated(place.node)
        if parts is not None:
            return _grown(place, *parts)
        place = _back(place)
    return None


def _written(place: _Place, write: fx.Node, memory: Memory) -> _Found | _Unclear | None:
    """An update by `write`: in place when it is not the node that is read. None where no state is written."""
    state, dims, _ = root_of(place.node)
    if state.op not in ("placeholder", "get_attr"):
        return None
    token_dim = dims[place.token_dim]
    target = target_of(write) if kind(write) in KINDS else None
    if target is None or shape(target) is None:
        return _Unclear(write, f"{op_name(write)} writes into {state.name}, which is no known cache update")
    written, dims, narrowed = root_of(target)
    if written is not state:
        return _Unclear(
            write, f"{op_name(write)} writes through {target.name}, whose place in {state.name} is not known"
        )
    dim = along(write)
    if isinstance(dim, str):
        return _Unclear(write, dim)
    entered = narrowed if dim is None else narrowed | {dims[dim]}
    if not entered:
        return _overwritten(place, write, state, memory)
    if entered != {token_dim}:
        return _Unclear(
            write, f"{op_name(write)} writes along dimension {sorted(entered)}, tokens are dimension {token_dim}"
        )
    in_place = write is not place.node or op_name(write).endswith("_")
    return _Found(write, kind(write), state, in_place, token_dim)


def _overwritten(place: _Place, write: fx.Node, state: fx.Node, memory: Memory) -> _Found | _Unclear:
    """All of a state is replaced: the update is the one that made the new contents."""
    source = arguments(write, "self", "src").get("src", write.args[-1])
    made = _walk(_Place(source, write, place.token_dim), memory) if isinstance(source, fx.Node) else None
    if not isinstance(made, _Found) or made.state is not state:
        return made if isinstance(made, _Unclear) else _Unclear(write, f"{op_name(write)} replaces all of it")
    return replace(made, node=write, in_place=True)


def _grown(place: _Place, parts: list[Any], dim: int) -> _Found | _Unclear | None:
    """`cat([cache, new], dim)`, with a slice of the cache or of the result where the cache slides."""
    roots = [root_of(part) if isinstance(part, fx.Node) else None for part in parts]
    held = [root is not None and root[0].op in ("placeholder", "get_attr") for root in roots]
    if not any(held):
        return None
    if len(parts) != 2 or (held[1] and not held[0]):
        return _Unclear(place.node, "cat of a cache that is not its first of two parts")
    if dim != place.token_dim:
        return _Unclear(place.node, f"cat along dimension {dim}, tokens are dimension {place.token_dim}")
    state, dims, narrowed = roots[0]
    if narrowed - {dims[dim]}:
        return _Unclear(place.node, "cat of a part of a cache's other dimensions")
    if not _kept(place.node):
        return _Unclear(place.node, f"cat with {state.name}, but the graph does not keep the result: no cache grows")
    sliding = place.sliced or bool(narrowed)
    return _Found(place.node, "cat and slice" if sliding else "cat", state, False, place.token_dim)


def _kept(node: fx.Node) -> bool:
    """Whether a tensor, or a part of it, is returned or written to a state."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or kind(user) in KINDS:
                return True
            if user not in seen and (view_of(user) is not None or kind(user) in SAME_NUMBERS):
                seen.add(user)
                stack.append(user)
    return False


def root_of(node: fx.Node) -> tuple[fx.Node, tuple[int, ...], frozenset[int]]:
    """The tensor a view looks at, updates of it included; its dimension for each of the view's; those seen in part."""
    dims: tuple[int, ...] = tuple(range(len(shape(node) or ())))
    narrowed: frozenset[int] = frozenset()
    while True:
        view = view_of(node)
        if view is not None and None not in view.dims:
            dims = tuple(view.dims[dim] for dim in dims)  # type: ignore[misc]
            narrowed = frozenset(view.dims[dim] for dim in narrowed) | view.narrowed  # type: ignore[misc]
            node = view.source
        elif kind(node) in KINDS and (target := target_of(node)) is not None:
            node = target
        else:
            return node, dims, narrowed


def owner(state: fx.Node) -> str:
    """Who holds a state: "input", "buffer", or "module" for a tensor that a module keeps otherwise."""
    if state.op == "get_attr":
        return "module"
    target = str(state.target)
    if "_buffers_" in target or target.startswith("b_"):
        return "buffer"
    return "module" if target.startswith(("L_self_", "p_", "c_")) else "input"


def _back(place: _Place) -> _Place | None:
    """One step back, to a tensor with the same tokens; None where new numbers are made."""
    node, dim = place.node, place.token_dim
    if node.op not in ("call_function", "call_method") or not is_pure(node):
        return None
    repeated = head_repetition(node)
    if repeated is not None:
        return replace(place, node=repeated, reader=node)
    view = view_of(node)
    if view is not None:
        source_dim = view.dims[dim]
        sliced = place.sliced or view.narrowed == {source_dim}
        known = source_dim is not None and view.narrowed <= {source_dim}
        return _Place(view.source, node, source_dim, sliced) if known else None
    source = node.args[0] if node.args else None
    same = isinstance(source, fx.Node) and same_sizes(shape(source) or (), shape(node) or ())
    return replace(place, node=source, reader=node) if same and kind(node) in SAME_NUMBERS else None


@dataclass(frozen=True)
class FindCacheUpdates(Pass):
    """List the stock caches of a graph; rewrites nothing."""

    def match(self, graph: fx.Graph) -> list[CacheUpdate | Refusal]:
        """The graph's cache updates and refusals."""
        return find_cache_updates(graph)

    def rewrite(self, graph: fx.Graph, matches: Sequence[Any]) -> int:
        """Nothing."""
        return 0
