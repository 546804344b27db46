"""Remove what a rewrite left without users: the unpack, its getitems, the head repetition, masks nobody reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from apack_compile.passes.base import MatchRecord, Pass
from apack_compile.passes.graph.effects import live_nodes


@dataclass(frozen=True)
class DeadNode:
    """A node without effect that nothing live depends on."""

    node: fx.Node

    def record(self) -> MatchRecord:
        """What a report shows of the node."""
        return MatchRecord(self.node.name)


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Erase nodes that are known to be pure and that nothing live depends on.

    Not `graph.eliminate_dead_code`: that would use our purity test on the graph itself, but clean the subgraphs of
    higher-order operators with its own, which takes an `index_copy_` whose result is unused for dead.
    """

    only_after_change: ClassVar[bool] = True

    def match(self, graph: fx.Graph) -> list[DeadNode]:
        """Dead nodes, users before what they use."""
        return [DeadNode(node) for node in dead_nodes(graph)]

    def rewrite(self, graph: fx.Graph, matches: Sequence[Any]) -> int:
        """Erase the dead nodes."""
        for dead in matches:
            graph.erase_node(dead.node)
        return len(matches)


def dead_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Dead nodes, users before what they use."""
    live = live_nodes(graph)
    return [node for node in reversed(graph.nodes) if node not in live]


def erase_dead(graph: fx.Graph) -> None:
    """Erase the dead nodes."""
    for node in dead_nodes(graph):
        graph.erase_node(node)
