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

from apack_compile.passes.base import Pass, Refusal
from apack_compile.passes.buffer_pairs import BufferPair, find_pairs
from apack_compile.passes.components import deinterleaved_node
from apack_compile.passes.nodes import value_of
from apack_compile.passes.sites import AttentionSite, find_sites


@dataclass(frozen=True)
class StateLayout:
    """How many tensors a packed layer has of each kind, in the order in which the graph takes them.

    segments: packed ones; turns: whether keys are turned back, `block` slots at a time; interleaved_pairs: as `unpack` has them.
    """

    segments: int = 2
    turns: bool = False
    block: int = 0
    interleaved_pairs: int = 0

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
        for name in (
            "attention",
            "buffer_pairs",
            "cache_updates",
            "components",
            "effects",
            "memory",
            "nodes",
            "origin",
            "sites",
            "update_kinds",
        )
    )

    def match(self, graph: fx.Graph) -> list[BufferPair | Refusal]:
        """The graph's pairs, and what is refused."""
        found = find_pairs(graph)
        pairs = [pair for pair in found if isinstance(pair, BufferPair)]
        reasons: dict[fx.Node, str] = {}
        while True:
            again = self._refused_sites(graph, [pair for pair in pairs if pair.node not in reasons])
            if not again:
                break
            reasons |= again
        return [
            Refusal(m.node, m.key.layer, reasons[m.node], False)
            if isinstance(m, BufferPair) and m.node in reasons
            else m
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
        turned: dict[str, Any] = {"block": self.layout.block} if turns else {}
        pairs = self.layout.interleaved_pairs
        with graph.inserting_before(pair.node):
            new = (deinterleaved_node(graph, pair.new_key, pairs), pair.new_value)
            append = graph.call_function(
                torch.ops.apack.append.default,
                (*new, dense[2:] + codes[-4:], bases[-6:], bands[-8:], cursor),
                {"text_turns": turns[-1], **turned} if turns else {},
            )
            unpack = graph.call_function(
                torch.ops.apack.unpack.default,
                # FuseAttend takes it away: its length is never asked for
                (*new, dense, codes, bases, bands, positions, cursor, 0),
                {"turns": turns, **turned, "interleaved_pairs": pairs} if turns else {},
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
