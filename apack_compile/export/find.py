"""Which caches of a program can be packed: pairs of its buffers (passes/buffers/pairs.py), and those that no attention reads."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from apack_compile.export.state import ROOT
from apack_compile.passes.attention.attention import NoAttention, find_attentions
from apack_compile.passes.base import Refusal
from apack_compile.passes.buffers.cache_updates import root_of
from apack_compile.passes.buffers.packed_state import attended
from apack_compile.passes.buffers.pairs import BufferPair, BufferStream, Rules, find_pairs
from apack_compile.passes.buffers.positions import Counted
from apack_compile.passes.buffers.update_kinds import KINDS, target_of
from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import kind


def find_caches(gm: fx.GraphModule, tried: bool = False) -> tuple[list[BufferPair | Refusal], dict[str, str]]:
    """Every cache that attention reads, in the order of the attentions; by name, why others written like one are not read by one.

    A pair can be packed by what its own nodes say; where `tried`, also by what would become of its attentions.
    """
    buffers = dict(gm.named_buffers(remove_duplicate=False))

    def why_not_buffer(state: fx.Node) -> str | None:
        owned = state.op == "get_attr" and state.target in buffers
        return None if owned else f"{state.name} is an input, not a buffer of the program"

    found = find_pairs(gm.graph, Rules(why_not_buffer, why_not_given))
    targets = [target_of(write) for m in found for write in (m.writes if isinstance(m, BufferPair) else m.covers)]
    known = {str(root_of(target)[0].target) for target in targets if target is not None}
    unread = _unread(gm.graph, {name: buffer for name, buffer in buffers.items() if name not in known})
    return attended(gm.graph, found) if tried else found, unread


def why_not_given(stream: BufferStream, origin: Counted) -> str | None:
    """Why positions are not an input's."""
    if origin.inputs:
        return None
    where = f": it always writes from slot {stream.start} on" if isinstance(stream.start, int) else ""
    return f"its positions do not come from an input{where}"


def drop_checks(graph: fx.Graph) -> None:
    """Erase checks of dtypes that exporting put beside each `to`: they hold, and would count as readers of what they check."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def _unread(graph: fx.Graph, buffers: Mapping[str, Tensor]) -> dict[str, str]:
    """Those of some buffers that are `[B, H_kv, T, D]` and written, but that no attention was found to read, and why."""
    memory, found = Memory.of(graph), dict[str, str]()
    unknown = [match for match in find_attentions(graph, memory) if isinstance(match, NoAttention)]
    for write, targets in memory.writes:
        for root in (root_of(target)[0] for target in targets):
            name = str(root.target)
            buffer = buffers.get(name) if root.op == "get_attr" and kind(write) in KINDS else None
            if buffer is None or name.startswith(f"{ROOT}.") or buffer.dim() != 4 or not buffer.is_floating_point():
                continue
            later = (match.why for match in unknown if memory.order[match.node] > memory.order[write])
            found[name] = next(later, "no attention that reads it was found")
    return found
