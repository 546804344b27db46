"""One stream of a cache in a program: the buffer, the one write into it, and everything that reads it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from apack_compile.passes.cache_updates import CacheUpdate, root_of
from apack_compile.passes.effects import written
from apack_compile.passes.memory import Memory
from apack_compile.passes.nodes import arguments, kind, op_name, same_sizes, shape, value_of
from apack_compile.passes.views import entries_of, view_of


@dataclass(frozen=True)
class Span:
    """Positions of a slice write: those from `start` on."""

    start: fx.Node


@dataclass(frozen=True)
class Stream:
    """K or V of one cache.

    new: the tokens that `write` puts in, leading dimensions of 1 may lack; order: their dimensions as `[B, H_kv, n, D]`. layout: the
    buffer's dimensions so. readers: what reads the cache after the write, with the node that it reads and that node's dimensions.
    leftover: nodes that write the update back. names: of the buffer, and of others that are it.
    """

    buffer: str
    write: fx.Node
    new: fx.Node
    index: fx.Node | Span
    order: tuple[int, ...]
    layout: tuple[int, ...]
    readers: tuple[tuple[fx.Node, fx.Node, tuple[int, ...]], ...]
    leftover: tuple[fx.Node, ...]
    tensor: torch.Tensor
    names: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int, int, int]:
        """`[B, H_kv, T, D]`."""
        batch, heads, tokens, width = (int(self.tensor.shape[dim]) for dim in self.layout)
        return batch, heads, tokens, width


def read_stream(gm: fx.GraphModule, update: CacheUpdate, memory: Memory) -> Stream | str:
    """The stream of an update, or why its buffer cannot be replaced."""
    state, write = update.state, update.node
    if update.kind.startswith("cat"):
        what = "slides: its oldest tokens leave it" if update.kind == "cat and slice" else "grows by cat"
        return f"it {what}, which is no buffer written at positions"
    buffer, buffers = str(state.target), dict(gm.named_buffers(remove_duplicate=False))
    if state.op != "get_attr" or buffer not in buffers:
        return f"{state.name} is an input, not a buffer of the program"
    tensor = buffers[buffer]
    if tensor.dim() != 4 or update.token_dim not in (1, 2):
        return f"{buffer} {tuple(tensor.shape)} is neither [B, H_kv, T, D] nor [B, T, H_kv, D]"
    storage = tensor.untyped_storage()._cdata
    same = [name for name, other in buffers.items() if other.untyped_storage()._cdata == storage]
    used = {str(node.target) for node in gm.graph.find_nodes(op="get_attr") if node.users}
    shared = next((name for name in same if name != buffer and name in used), None)
    if shared is not None:
        return f"{buffer} shares its memory with {shared}"
    entered = _entered(write)
    if isinstance(entered, str):
        return entered
    target, new, index, slice_node = entered
    layout = (0, 3 - update.token_dim, update.token_dim, 3)
    root, dims, _ = root_of(target)
    right = root is state and sorted(dims) == [0, 1, 2, 3]
    given = shape(new) if isinstance(new, fx.Node) else None
    if not right or given is None or len(given) > 4:
        return f"{op_name(write)} writes through a view of {buffer} that is not understood"
    if value_of(new).dtype != tensor.dtype:
        return f"{buffer} is {tensor.dtype}, the tokens written to it are {value_of(new).dtype}"
    others = [i for i in range(4) if dims[i] != update.token_dim]
    sizes, tokens = shape(target) or (), (*(1,) * (4 - len(given)), *given)
    if not same_sizes([sizes[i] for i in others], [tokens[i] for i in others]):
        return f"{op_name(write)} writes tokens {tuple(given)} into {buffer} {tuple(tensor.shape)}"
    if isinstance(index, fx.Node) and not same_sizes(shape(index) or (), (tokens[dims.index(update.token_dim)],)):
        return f"{op_name(write)} writes {tuple(given)} tokens at positions {tuple(shape(index) or ())}"
    uses = _uses(gm.graph, buffer, write, dims, slice_node, memory)
    if isinstance(uses, str):
        return uses
    readers = tuple(
        (reader, node, tuple(layout.index(dim) for dim in node_dims)) for reader, node, node_dims in uses[0]
    )
    order = tuple(dims.index(dim) for dim in layout)
    return Stream(buffer, write, new, index, order, layout, readers, tuple(uses[1]), tensor, tuple(same))


_Entered = tuple[fx.Node, fx.Node, fx.Node | Span, fx.Node | None]


def _entered(write: fx.Node) -> _Entered | str:
    """Target, new tokens, their positions, and the slice of a slice write."""
    name = kind(write)
    if name == "index_copy":
        given = arguments(write, "self", "dim", "index", "source")
        return given["self"], given["source"], given["index"], None
    if name in ("index_put", "setitem"):
        given = arguments(write, "self", "index", "value")
        return _indexed(write, given["self"], given.get("index", given.get("indices")), given["value"])
    if name == "slice_scatter":
        given = arguments(write, "self", "src", "dim", "start", "end", "step")
        span = _span(write, given.get("start"), given.get("step", 1))
        new, old = given["src"], None
        if kind(new) == "copy" and not written(new):
            # what functionalization makes of a copy_ into a slice
            old, new = new.args[:2]
        return span if isinstance(span, str) else (given["self"], new, span, old)
    if name == "copy":
        target, new = write.args[:2]
        part = _slice_of(target)
        if part is None:
            return f"{op_name(write)} replaces all of its buffer"
        span = _span(write, *part)
        return span if isinstance(span, str) else (target, new, span, target)  # type: ignore[return-value]
    return f"{op_name(write)} is no write at the positions of an index"


def _indexed(write: fx.Node, target: fx.Node, index: Any, new: fx.Node) -> _Entered | str:
    entries = [slice(None) if e is None else e for e in index] if kind(write) == "index_put" else index
    found = [e for e in entries_of(entries, len(shape(target) or ())) or () if e != slice(None)]
    if len(found) == 1 and isinstance(found[0], slice):
        span = _span(write, found[0].start, found[0].step or 1)
        return span if isinstance(span, str) else (target, new, span, None)
    if len(found) != 1 or not isinstance(found[0], fx.Node) or len(shape(found[0]) or ()) != 1:
        return f"{op_name(write)} does not write at the positions of one index"
    return target, new, found[0], None


def _slice_of(node: Any) -> tuple[Any, Any] | None:
    """Start and step of a slice of one dimension."""
    if not isinstance(node, fx.Node):
        return None
    if kind(node) == "slice":
        given = arguments(node, "self", "dim", "start", "end", "step")
        return given.get("start"), given.get("step", 1)
    if kind(node) == "narrow":
        return arguments(node, "self", "dim", "start", "length").get("start"), 1
    if kind(node) == "getitem":
        parts = [e for e in entries_of(node.args[1], 4) or () if e != slice(None)]
        if len(parts) == 1 and isinstance(parts[0], slice):
            return parts[0].start, parts[0].step or 1
    return None


def _span(write: fx.Node, start: Any, step: Any) -> Span | str:
    if step != 1:
        return f"{op_name(write)} writes every {step} slots"
    if not isinstance(start, fx.Node):
        return f"its positions do not come from an input: {op_name(write)} always writes from slot {start or 0} on"
    return Span(start)


def _uses(
    graph: fx.Graph,
    buffer: str,
    write: fx.Node,
    written_dims: tuple[int, ...],
    slice_node: fx.Node | None,
    memory: Memory,
) -> tuple[list[tuple[fx.Node, fx.Node, tuple[int, ...]]], list[fx.Node]] | str:
    """Who reads the buffer after the write, and what is left over of it; a reason where somebody else has to do with it."""
    order, in_place = memory.order, bool(written(write))
    aliases: dict[fx.Node, Any] = {
        node: (0, 1, 2, 3) for node in graph.nodes if node.op == "get_attr" and node.target == buffer
    }
    aliases[write] = written_dims
    stack = list(aliases)
    readers: list[tuple[fx.Node, fx.Node, tuple[int, ...]]] = []
    leftover: list[fx.Node] = []
    while stack:
        node = stack.pop()
        for user in node.users:
            view = view_of(user)
            is_after = order[user] > order[write]
            if user is write or user in aliases or user in leftover:
                continue
            if user is slice_node:
                others = [other for other in user.users if other is not write and other not in write.all_input_nodes]
                if others:
                    return f"{buffer} is also used by {op_name(others[0])}"
            elif not is_after and view is not None and None not in view.dims and not view.narrowed:
                aliases[user] = tuple(aliases[node][dim] for dim in view.dims)
                stack.append(user)
            elif not in_place and kind(user) == "copy" and _writes_back(user, buffer, write):
                leftover.append(user)
            elif node in written(user):
                return f"{buffer} is written twice, also by {op_name(user)}"
            elif not is_after or (not in_place and node is not write):
                return f"{buffer} is also used by {op_name(user)}, before the write"
            elif slice_node is not None and node is write and in_place:
                return f"the slice that is written of {buffer} is also used by {op_name(user)}"
            else:
                readers.append((user, node, aliases[node]))
    return readers, leftover


def _writes_back(copy: fx.Node, buffer: str, write: fx.Node) -> bool:
    """Whether a copy_ puts the result of a functional update into its buffer."""
    target, source = copy.args[:2]
    return isinstance(target, fx.Node) and target.op == "get_attr" and target.target == buffer and source is write
