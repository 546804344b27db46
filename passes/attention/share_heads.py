"""Let `scaled_dot_product_attention` share key heads among query heads by itself, where the graph repeats them before it.

Repeating writes every key and value of a dense cache once more for each query head, at every step. With `enable_gqa` the CPU kernel
reads them where they are and computes the same numbers in the same order (benchmarks/share_heads.py). On other devices a mask or the
dtype decides which kernel serves, and the one for shared heads may be slower: left alone there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from apack_compile.passes.attention.attention import SDPA, Attention, find_attentions
from apack_compile.passes.attention.origin import head_repetition
from apack_compile.passes.base import MatchRecord, Pass
from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import layer_path, shape, value_of


@dataclass(frozen=True)
class RepeatedHeads:
    """An attention whose key and value are the heads of `key` and `value`, each `repeats` times."""

    node: fx.Node
    key: fx.Node
    value: fx.Node
    repeats: int

    def record(self) -> MatchRecord:
        """What a report shows of the attention."""
        return MatchRecord(self.node.name, layer_path(self.node), details={"repeats": self.repeats})


@dataclass(frozen=True)
class ShareHeads(Pass):
    """Drop head repetition before attention on a CPU."""

    def match(self, graph: fx.Graph) -> list[RepeatedHeads]:
        """The attentions over repeated heads."""
        memory = Memory.of(graph)
        found = (_repeated(match, memory) for match in find_attentions(graph, memory) if isinstance(match, Attention))
        return [match for match in found if match is not None]

    def rewrite(self, graph: fx.Graph, matches: Sequence[Any]) -> int:
        """Give the attentions the heads as they are; the repetition stays until dead code is removed."""
        for match in matches:
            names = dict(enumerate(match.node.args)) | dict(match.node.kwargs)
            for at, name, source in ((1, "key", match.key), (2, "value", match.value)):
                if at in names:
                    match.node.update_arg(at, source)
                else:
                    match.node.update_kwarg(name, source)
            match.node.update_kwarg("enable_gqa", True)
        return len(matches)


def _repeated(found: Attention, memory: Memory) -> RepeatedHeads | None:
    out = value_of(found.node)
    if found.spelling != SDPA or found.enable_gqa or out is None or out.device.type != "cpu" or out.requires_grad:
        return None
    # only a repetition that is a node of its own has a source
    key, value = (head_repetition(node) for node in (found.key, found.value))
    if key is None or value is None or memory.write_between(*_first_and_last(found, memory), (key, value)) is not None:
        return None
    heads = [shape(node) for node in (key, value, found.key, found.value, found.query)]
    if any(size is None or len(size) != 4 or not isinstance(size[1], int) for size in heads):
        return None
    before, value_before, after, value_after, query = (int(size[1]) for size in heads)
    same = before == value_before and after == value_after == query
    return RepeatedHeads(found.node, key, value, after // before) if same and before < after else None


def _first_and_last(found: Attention, memory: Memory) -> tuple[fx.Node, fx.Node]:
    """The nodes between which what is repeated must stay as it is."""
    return min((found.key, found.value), key=memory.order.__getitem__), found.node
