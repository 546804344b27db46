"""Let `scaled_dot_product_attention` read each key head once for all query heads that share it, on a CPU.

Repeating heads before it writes every key and value of a dense cache once more for each query head, at every step. With `enable_gqa`
the CPU kernel reads them where they are. For a few query tokens it is faster still when the query heads that share a key head are rows
of one head: products of matrices instead of one product with a vector for each query head (benchmarks/share_heads.py). On other devices
a mask or the dtype decides which kernel serves, and the one for shared heads may be slower: left alone there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from apack_compile.passes.attention.attention import SDPA, SDPA_ARGUMENTS, Attention, find_attentions
from apack_compile.passes.attention.origin import head_repetition
from apack_compile.passes.base import MatchRecord, Pass
from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import arguments, layer_path, recorded_as, shape, value_of

# Query tokens up to which rows of heads are faster with every dtype.
MOST_ROWS = 8


@dataclass(frozen=True)
class RepeatedHeads:
    """An attention where each head of `key` and `value` serves `repeats` query heads.

    query_tokens: where the query heads can become rows of one head, else None.
    """

    node: fx.Node
    key: fx.Node
    value: fx.Node
    repeats: int
    query_tokens: int | None

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
            _set_argument(match.node, 1, "key", match.key)
            _set_argument(match.node, 2, "value", match.value)
            if match.query_tokens is None:
                match.node.update_kwarg("enable_gqa", True)
            else:
                _heads_as_rows(graph, match)
        return len(matches)


def _repeated(found: Attention, memory: Memory) -> RepeatedHeads | None:
    out = value_of(found.node)
    if found.spelling != SDPA or out is None or out.device.type != "cpu" or out.requires_grad:
        return None
    key, value = (found.key, found.value) if found.enable_gqa else _before_repetition(found, memory)
    if key is None or value is None:
        return None
    heads = [shape(node) for node in (key, value, found.query)]
    if any(size is None or len(size) != 4 or not isinstance(size[1], int) for size in heads):
        return None
    before, value_before, query = (int(size[1]) for size in heads)
    if before != value_before or query % before or before == query:
        return None
    query_tokens = _few_query_tokens(found)
    if found.enable_gqa and query_tokens is None:
        return None
    return RepeatedHeads(found.node, key, value, query // before, query_tokens)


def _before_repetition(found: Attention, memory: Memory) -> tuple[fx.Node | None, fx.Node | None]:
    """The tensors whose heads are repeated, where only a repetition is between them and the attention."""
    # only a repetition that is a node of its own has a source
    key, value = (head_repetition(node) for node in (found.key, found.value))
    first = min((found.key, found.value), key=memory.order.__getitem__)
    read = [node for node in (key, value) if node is not None]
    return (None, None) if memory.write_between(first, found.node, read) is not None else (key, value)


def _few_query_tokens(found: Attention) -> int | None:
    """The number of query tokens, where they are few, the mask is the same for all heads, and the result lies by heads in memory."""
    tokens, masks = value_of(found.query).shape[2], [shape(term.node) for term in found.masks]
    few = isinstance(tokens, int) and tokens <= MOST_ROWS and found.is_causal is False and found.dropout == 0
    shared = all(size is not None and len(size) == 4 and size[1] == 1 for size in masks)
    # what comes after may make views of the result
    return tokens if few and shared and value_of(found.node).is_contiguous() else None


def _heads_as_rows(graph: fx.Graph, match: RepeatedHeads) -> None:
    """The query heads of a key head become rows of one head: `[B, H_kv, repeats * tokens, D]`."""
    node, repeats = match.node, match.repeats
    heads, tokens = value_of(match.key).shape[1], match.query_tokens
    given = arguments(node, *SDPA_ARGUMENTS)
    with graph.inserting_before(node):
        query = _method(graph, given["query"], "unflatten", 1, (heads, repeats))
        _set_argument(node, 0, "query", _method(graph, query, "flatten", 2, 3))
        if given.get("attn_mask") is not None:
            mask = _method(graph, given["attn_mask"], "unsqueeze", 2)
            mask = _method(graph, mask, "expand", -1, -1, repeats, tokens, -1)
            _set_argument(node, 3, "attn_mask", _method(graph, mask, "flatten", 2, 3))
    _set_argument(node, 7, "enable_gqa", False)
    result = node.meta.copy()
    node.meta[recorded_as(node)] = value_of(node).unflatten(1, (heads, repeats)).flatten(2, 3)
    with graph.inserting_after(node):
        by_head = _method(graph, node, "unflatten", 2, (repeats, tokens))
    with graph.inserting_after(by_head):
        out = graph.call_method("flatten", (by_head, 1, 2))
    # source_fn_stack would say that the node came from scaled_dot_product_attention.
    out.meta = {name: value for name, value in result.items() if name != "source_fn_stack"}
    node.replace_all_uses_with(out, delete_user_cb=lambda user: user is not by_head)


def _method(graph: fx.Graph, node: fx.Node, name: str, *args: Any) -> fx.Node:
    """A method of a tensor as a node with a recorded value, at the graph's insertion point."""
    made = graph.call_method(name, (node, *args))
    made.meta[recorded_as(node)] = getattr(value_of(node), name)(*args)
    return made


def _set_argument(node: fx.Node, at: int, name: str, value: Any) -> None:
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)
