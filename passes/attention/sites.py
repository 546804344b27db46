"""Which attentions of a graph read a packed cache and can attend to it instead, and why the others do not.

The graph is torch-level (before AOTAutograd), so head repetition is still the few nodes that the model's author wrote. A site is
accepted only when every condition below holds; otherwise the refusal names the first that does not.
"""

from dataclasses import dataclass

import torch
from torch import fx

from apack_compile.passes.attention.attention import FLEX, SDPA, Attention, NoAttention, find_attentions
from apack_compile.passes.attention.masks import why_not_one_mask
from apack_compile.passes.attention.origin import NEW_KEYS, Origin, Stop, is_unpack, origin, reads_unpack
from apack_compile.passes.attention.scores import PRODUCTS, imprecise
from apack_compile.passes.base import MatchRecord, Refusal
from apack_compile.passes.graph.effects import is_pure, live_nodes
from apack_compile.passes.graph.memory import Memory
from apack_compile.passes.graph.nodes import kind, layer_path, op_name, same_sizes, shape, value_of


@dataclass(frozen=True)
class AttentionSite:
    """One attention whose keys and values come from a packed cache; `grouped`: its query is `[B, H_kv, groups, rows, D]`."""

    attention: Attention
    groups: int
    grouped: bool
    unpack: fx.Node
    layer: str | None
    between: frozenset[fx.Node]

    @property
    def node(self) -> fx.Node:
        return self.attention.node

    def record(self) -> MatchRecord:
        """What a report shows of the site."""
        details = {**self.attention.details(), "groups": self.groups, "unpack": self.unpack.name}
        return MatchRecord(self.node.name, self.layer, None, True, details)


def find_sites(graph: fx.Graph) -> list[AttentionSite | Refusal]:
    """Every attention of the graph in order, then each packed cache that something else reads too."""
    memory = Memory.of(graph)
    found = [_site(match, memory) for match in find_attentions(graph, memory)]
    return [*found, *_other_readers(graph, found)]


def _site(match: Attention | NoAttention, memory: Memory) -> AttentionSite | Refusal:
    layer = layer_path(match.node)
    if isinstance(match, NoAttention):
        products = [node for node in (*match.interior, match.node) if kind(node) in PRODUCTS]
        packed = any(reads_unpack(source) for node in products for source in node.all_input_nodes)
        return Refusal(match.node, layer, match.why, packed, frozenset(match.interior))
    query = _sizes(match.query)
    grouped = len(query) == 5 and isinstance(query[2], int)
    key, value = (origin(node, query[2] if grouped else None) for node in (match.key, match.value))
    details, covers = match.details(), frozenset(match.interior)
    from_cache = [isinstance(end, Origin) or reads_unpack(end.node) for end in (key, value)]
    if not any(from_cache):
        return Refusal(match.node, layer, "dense: key does not come from a packed cache", False, covers, details)
    unexpressed = _not_expressed(match)
    if not all(from_cache):
        names = ("value", "key") if from_cache[0] else ("key", "value")
        unexpressed = f"{names[0]} does not come from a packed cache, but {names[1]} does"
    if unexpressed is not None:
        return Refusal(match.node, layer, unexpressed, True, covers, details)
    for name, end in (("key", key), ("value", value)):
        if isinstance(end, Stop):
            return Refusal(match.node, layer, f"{name}: {end.why}", True, covers, details)
    assert isinstance(key, Origin) and isinstance(value, Origin)
    reason = (
        _origins_differ(key, value)
        or _shapes(match, key)
        or _types(match)
        or why_not_one_mask(match.masks, (*query[:-1], _packed_shape(key)[2]))
        or _writes(match, memory, key, value)
    )
    if reason is not None:
        return Refusal(match.node, layer, reason, True, covers, details)
    return AttentionSite(
        attention=match,
        groups=int(query[2 if grouped else 1]) // (1 if grouped else int(_packed_shape(key)[1])),
        grouped=grouped,
        unpack=key.unpack,
        layer=layer,
        between=frozenset((key.unpack, *key.path, *match.transposed, *value.path)),
    )


def _origins_differ(key: Origin, value: Origin) -> str | None:
    if key.unpack is not value.unpack:
        return "key and value come from different packed caches"
    if (key.output, value.output) == (1, 0):
        return "key and value are swapped: key comes from the unpacked values, value from the unpacked keys"
    if (key.output, value.output) != (0, 1):
        return f"key is output {key.output} and value output {value.output} of the packed cache, expected 0 and 1"
    if key.repeats != value.repeats:
        return f"key heads are repeated {key.repeats} times, value heads {value.repeats} times"
    return None


def _not_expressed(found: Attention) -> str | None:
    """What `apack::attend` has no argument for."""
    if found.spelling == FLEX:
        return "flex_attention: attend has neither score_mod nor block_mask"
    if isinstance(found.dropout, fx.Node) or found.dropout != 0:
        return f"dropout_p is {found.dropout}, not the constant 0"
    if found.is_causal is not False:
        return "is_causal aligns the mask with the first of all slots, not with the newest token"
    if found.softcap is not None:
        return f"softcap {found.softcap:g}: attend has none"
    if found.sinks is not None:
        return "attention sinks: attend has none"
    if found.grouped:
        return "batch and heads share one dimension of the scores"
    if found.scale is not None and not isinstance(found.scale, (int, float)):
        return "scale is not a constant"
    return None


def _shapes(found: Attention, key: Origin) -> str | None:
    query, packed, out = _sizes(found.query), _packed_shape(key), value_of(found.node)
    if not query or not isinstance(out, torch.Tensor) or len(packed) != 4:
        return "the graph does not record the shapes of query and packed cache"
    if len(query) not in (4, 5) or not same_sizes(query[:1], packed[:1]):
        return f"query {tuple(query)} does not match the packed keys {tuple(packed)}"
    if not same_sizes(query[-1:], packed[3:]):
        return f"query's head_dim {query[-1]} is not the key's {packed[3]}"
    if len(query) == 5:
        right = same_sizes(query[1:2], packed[1:2]) and key.repeats == 1
        return None if right else f"query {tuple(query)} is not grouped by the {packed[1]} packed key heads"
    heads, repeated = query[1], packed[1] * key.repeats
    grouped = found.enable_gqa or repeated == 1
    if not (heads % repeated == 0 if grouped else heads == repeated):
        return f"{heads} query heads over {repeated} key heads"
    return None


def _types(found: Attention) -> str | None:
    query, key, out = (value_of(node) for node in (found.query, found.key, found.node))
    # One operation computes inside as precisely as it likes.
    if found.spelling != SDPA and (query.dtype != key.dtype or out.dtype != query.dtype):
        return f"the attention changes type ({query.dtype} to {out.dtype}), as autocast does"
    rounded = imprecise(found.interior, query.dtype)
    if rounded is not None:
        return f"{op_name(rounded)} computes in {value_of(rounded).dtype}, the query is {query.dtype}"
    if out.requires_grad:
        return "a gradient is needed, and attention over a packed cache has none"
    return None


def _sizes(node: fx.Node) -> torch.Size:
    return shape(node) or torch.Size(())


def _packed_shape(origin: Origin) -> torch.Size:
    """The shape of the `unpack` output the walk ended at."""
    return _sizes(origin.path[-1])


def _writes(found: Attention, memory: Memory, key: Origin, value: Origin) -> str | None:
    """A write before the attention's place to what is read earlier than there, where `apack::attend` will read it.

    Keys and values are read by unpack; query and masks by the first product and what follows it.
    """
    read = [*key.unpack.all_input_nodes, *key.path, *found.transposed, *value.path]
    before = min((found.node, *found.interior), key=memory.order.__getitem__)
    return memory.write_between(key.unpack, found.node, read) or memory.write_between(
        before, found.node, [found.query, *(term.node for term in found.masks)]
    )


def _other_readers(graph: fx.Graph, found: list[AttentionSite | Refusal]) -> list[Refusal]:
    """Packed caches that stay unpacked because something besides the found sites reads them."""
    sites = [m for m in found if isinstance(m, AttentionSite)]
    # Attentions that were refused said why already.
    known = {node for m in found if isinstance(m, Refusal) and m.packed for node in (m.node, *m.covers)}
    known |= {node for s in sites for node in (s.node, *s.attention.interior, *s.between)}
    live = live_nodes(graph)
    refusals = []
    for unpack in filter(is_unpack, graph.nodes):
        inside = {unpack}.union(*(s.between for s in sites if s.unpack is unpack))
        users = [user for node in inside for user in node.users if user not in known and user in live]
        reader = next((r for user in users if (r := _reader(user, known)) is not None), None)
        if reader is not None:
            reason = f"unpack's tokens are used by {op_name(reader)}, not only by attention"
            refusals.append(Refusal(unpack, layer_path(unpack), reason, True))
    return refusals


def _reader(node: fx.Node, known: set[fx.Node]) -> fx.Node | None:
    """What finally reads a view of unpacked tokens; None when only nodes in `known` do."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        if here in known or here in seen:
            continue
        if not is_pure(here) or kind(here) in NEW_KEYS:
            return here
        seen.add(here)
        stack += here.users
    return None
