"""Who writes which memory, in the order of a graph.

Order, not edges, carries writes in a Dynamo graph: `scores.masked_fill_(...)` may have no users, and the next node names `scores`
again. Memory is compared by storage, so views of one tensor count as one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from apack_compile.passes.graph.effects import attribute_of, written
from apack_compile.passes.graph.nodes import op_name, value_of


@dataclass(frozen=True)
class Memory:
    """The writes of a graph; it holds for the graph as it was when `of` read it."""

    order: dict[fx.Node, int]
    writes: tuple[tuple[fx.Node, tuple[fx.Node, ...]], ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> "Memory":
        """Read a graph once."""
        nodes = list(graph.nodes)
        writes = tuple((node, tuple(targets)) for node in nodes if (targets := written(node)))
        return cls({node: at for at, node in enumerate(nodes)}, writes)

    def last_write(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The last write, after `node` and before `reader`, to what `node` returned."""
        found = None
        for writer, targets in self.writes:
            if self.order[node] < self.order[writer] < self.order[reader] and _touches(targets, {node}):
                found = writer
        return found

    def write_between(self, start: fx.Node, end: fx.Node, read: Iterable[fx.Node]) -> str | None:
        """Which write, after `start` and before `end`, may change one of the nodes `read`; None when there is none."""
        nodes = set(read)
        for writer, targets in self.writes:
            if not self.order[start] < self.order[writer] < self.order[end]:
                continue
            target = _touches(targets, nodes)
            if target is not None:
                unknown = ", whose memory is not known," if value_of(target) is None else ""
                return f"{op_name(writer)} may write {target.name}{unknown} between the packed cache and the attention"
        return None


def shares_memory(node: fx.Node, state: fx.Node) -> bool:
    """Whether a node looks at a state's memory, or at memory that is not known."""
    value = value_of(node)
    unknown = value is None and not isinstance(attribute_of(node), fx.GraphModule)
    return node is state or unknown or not _storages(value).isdisjoint(_storages(value_of(state)))


def _touches(targets: Iterable[fx.Node], nodes: set[fx.Node]) -> fx.Node | None:
    """The first target that is, shares memory with, or may share memory with one of the nodes."""
    storages = {storage for node in nodes for storage in _storages(value_of(node))}
    for target in targets:
        found = value_of(target)
        if target in nodes or found is None or not storages.isdisjoint(_storages(found)):
            return target
    return None


def _storages(value: Any) -> set[int]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return {part.untyped_storage()._cdata for part in parts if isinstance(part, torch.Tensor)}
