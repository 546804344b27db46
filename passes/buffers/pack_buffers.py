"""Let a graph attend to packed state in place of a pair of static buffers that it writes new tokens into.

The update of both buffers becomes `apack::append`, what reads them `apack::unpack`; `FuseAttend` then makes one `apack::attend` of
unpack and attention. A pair for which it would not is refused with its reason, so that nothing is unpacked at every step. The state
comes in through further graph inputs: packing anew changes no graph.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from apack_compile.kernels.state import Layout, PackedState
from apack_compile.passes.base import Pass, Refusal
from apack_compile.passes.buffers.ahead import why_not_ahead
from apack_compile.passes.buffers.packed_state import TEXT_ONLY, attended, put_unpack, state_nodes
from apack_compile.passes.buffers.pairs import BufferPair, Rules, find_pairs
from apack_compile.passes.buffers.update_kinds import KINDS, target_of
from apack_compile.passes.graph.dead_code import erase_dead
from apack_compile.passes.graph.nodes import kind, shape, value_of


@dataclass(frozen=True)
class PackBuffers(Pass):
    """Put append and unpack in the place of pairs of static buffers.

    layouts: of each pair's state, in the graph's order, as the operations are given them, once known.
    """

    layouts: tuple[tuple[int, ...], ...] = ()

    def match(self, graph: fx.Graph) -> list[BufferPair | Refusal]:
        """The graph's pairs, and what is refused."""
        return attended(graph, find_pairs(graph, RULES))

    def rewrite(self, graph: fx.Graph, matches: Sequence[BufferPair]) -> int:
        """Rewrite the pairs; their state comes in through new inputs, behind the graph's own."""
        erase_dead(graph)
        for i, pair in enumerate(matches):
            put_unpack(graph, pair, self._inputs(graph, i, value_of(pair.key.state)), at_positions=False)
        erase_dead(graph)
        for state in {stream.state for pair in matches for stream in (pair.key, pair.value)}:
            graph.erase_node(state)
        return len(matches)

    def _inputs(self, graph: fx.Graph, number: int, like: torch.Tensor) -> PackedState:
        """New graph inputs for the state of one layer, behind the last input."""
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]

        def added(name: str) -> fx.Node:
            nonlocal last
            with graph.inserting_after(last):
                last = graph.placeholder(f"packed_{number}_{name}")
            # Its own memory, which is all that is asked of it.
            last.meta["val"] = like.new_empty(0)
            return last

        return state_nodes(Layout.parse(self.layouts[number]) if self.layouts else TEXT_ONLY, added)


def _why_not_own(state: fx.Node) -> str | None:
    """Why an input or attribute of a graph is no buffer that can be released."""
    buffer = value_of(state)
    if buffer.requires_grad or isinstance(buffer, torch.nn.Parameter):
        return f"{state.name} is a parameter, or needs a gradient"
    size = buffer.numel() * buffer.dtype.itemsize
    if not buffer.is_contiguous() or not statically_known_true(buffer.untyped_storage().nbytes() == size):
        return f"{state.name} is a view: it has no memory of its own"
    return None


RULES = Rules(_why_not_own, why_not_ahead)


def read_besides(graph: fx.Graph, pairs: Iterable[BufferPair]) -> list[fx.Node]:
    """4-D inputs that the graph reads and that are no buffer of a pair: where one is packed, its tokens are not there."""
    known = {stream.state for pair in pairs for stream in (pair.key, pair.value)}
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr") and node not in known]
    return [node for node in inputs if len(shape(node) or ()) == 4 and any(_reads(user, node) for user in node.users)]


def _reads(user: fx.Node, state: fx.Node) -> bool:
    """Whether a node does more than write into a tensor in place."""
    return kind(user) not in KINDS or target_of(user) is not state or user.op == "output" or bool(user.users)
