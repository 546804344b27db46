"""Find the attention sites of a Dynamo graph, and say why an attention is not one.

The graph is torch-level (before AOTAutograd), so head repetition is still the few nodes that the model's author wrote,
and `scaled_dot_product_attention` is still one node. A site is accepted only when every condition below holds;
otherwise the refusal names the first that does not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from apack_compile.passes.base import MatchRecord, Refusal
from apack_compile.passes.effects import is_pure, live_nodes, written
from apack_compile.passes.nodes import layer_path, op_name, same_sizes, shape, value_of
from apack_compile.passes.origin import NEW_KEYS, Origin, Stop, is_unpack, origin, reads_unpack

SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class AttentionSite:
    """One attention whose keys and values come from a packed cache."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node
    scale: float | None
    groups: int
    unpack: fx.Node
    layer: str | None
    between: frozenset[fx.Node]

    def record(self) -> MatchRecord:
        """What a report shows of the site."""
        details = {
            "query": [str(size) for size in shape(self.query) or ()],
            "mask": [str(size) for size in shape(self.mask) or ()],
            "dtype": str(value_of(self.query).dtype),
            "scale": self.scale,
            "groups": self.groups,
            "unpack": self.unpack.name,
        }
        return MatchRecord(self.node.name, self.layer, None, True, details)


def find_sites(graph: fx.Graph) -> list[AttentionSite | Refusal]:
    """Every attention of the graph in order, then each packed cache that something else reads too."""
    found = [_site(node) for node in graph.nodes if is_attention(node)]
    return [*found, *_other_readers(graph, found)]


def is_attention(node: fx.Node) -> bool:
    """True for a call of `scaled_dot_product_attention`."""
    return node.op == "call_function" and op_name(node) in (
        "scaled_dot_product_attention",
        "aten::scaled_dot_product_attention",
    )


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an attention by name, whichever were passed by position."""
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**defaults, **dict(zip(SDPA_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _site(node: fx.Node) -> AttentionSite | Refusal:
    given = attention_arguments(node)
    layer = layer_path(node)
    key, value = origin(given["key"]), origin(given["value"])
    if isinstance(key, Stop) and not reads_unpack(key.node):
        if isinstance(value, Origin) or reads_unpack(value.node):
            return Refusal(node, layer, "key does not come from a packed cache, but value does", True)
        return Refusal(node, layer, "dense: key does not come from a packed cache", False)
    for name, end in (("key", key), ("value", value)):
        if isinstance(end, Stop):
            return Refusal(node, layer, f"{name}: {end.why}", True)
    assert isinstance(key, Origin) and isinstance(value, Origin)
    reason = _origins_differ(key, value) or _arguments(given) or _shapes(node, given, key) or _writes(node, key, value)
    if reason is not None:
        return Refusal(node, layer, reason, True)
    heads = _packed_shape(key)[1]
    scale = None if given["scale"] is None else float(given["scale"])
    return AttentionSite(
        node=node,
        query=given["query"],
        key=given["key"],
        value=given["value"],
        mask=given["attn_mask"],
        scale=scale,
        groups=int(value_of(given["query"]).shape[1]) // int(heads),
        unpack=key.unpack,
        layer=layer,
        between=frozenset((key.unpack, *key.path, *value.path)),
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


def _arguments(given: dict[str, Any]) -> str | None:
    dropout, causal, scale = given["dropout_p"], given["is_causal"], given["scale"]
    if isinstance(dropout, fx.Node) or dropout != 0:
        return f"dropout_p is {dropout}, not the constant 0"
    if causal is not False:
        return "is_causal aligns the mask with the first of all slots, not with the newest token"
    if scale is not None and not isinstance(scale, (int, float)):
        return "scale is not a constant"
    if not isinstance(given["attn_mask"], fx.Node):
        return "no mask: the empty slots that unpack returns would be attended"
    return None


def _shapes(node: fx.Node, given: dict[str, Any], key: Origin) -> str | None:
    query, mask, out = value_of(given["query"]), value_of(given["attn_mask"]), value_of(node)
    packed = _packed_shape(key)
    if not all(isinstance(t, torch.Tensor) for t in (query, mask, out)) or len(packed) != 4:
        return "the graph does not record the shapes of query, mask and packed cache"
    if query.ndim != 4 or not same_sizes(query.shape[:1], packed[:1]):
        return f"query {tuple(query.shape)} does not match the packed keys {tuple(packed)}"
    if not same_sizes(query.shape[3:], packed[3:]):
        return f"query's head_dim {query.shape[3]} is not the key's {packed[3]}"
    heads, repeated = query.shape[1], packed[1] * key.repeats
    grouped = given["enable_gqa"] is True or repeated == 1
    if not (heads % repeated == 0 if grouped else heads == repeated):
        return f"{heads} query heads over {repeated} key heads"
    if query.dtype != value_of(given["key"]).dtype or out.dtype != query.dtype:
        return f"the attention changes type ({query.dtype} to {out.dtype}), as autocast does"
    if out.requires_grad:
        return "a gradient is needed, and attention over a packed cache has none"
    if mask.ndim != 4:
        return f"mask has {mask.ndim} dimensions, not 4"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"mask is {mask.dtype}, neither bool nor floating point"
    full = (*query.shape[:3], packed[2])
    sizes = zip(mask.shape[:3], full[:3], strict=True)
    fits = all(statically_known_true(m == f) or statically_known_true(m == 1) for m, f in sizes)
    if not fits or not statically_known_true(mask.shape[3] == full[3]):
        return f"mask {tuple(mask.shape)} does not broadcast to {full} with all columns given"
    return None


def _packed_shape(origin: Origin) -> torch.Size:
    """The shape of the `unpack` output the walk ended at."""
    return shape(origin.path[-1]) or torch.Size(())


def _writes(node: fx.Node, key: Origin, value: Origin) -> str | None:
    """A write, after unpack read the cache and before the attention's place, to anything the two read.

    `apack::attend` reads at the attention's place what unpack read earlier. Memory is compared by storage: views share.
    """
    unpack = key.unpack
    read = [*unpack.all_input_nodes, *key.path, *value.path]
    storages = {_storage(value_of(n)) for n in read} - {None}
    here = unpack.next
    while here is not node:
        for target in written(here):
            found = value_of(target)
            parts = found if isinstance(found, (tuple, list)) else (found,)
            if target in read or any(isinstance(p, torch.Tensor) and _storage(p) in storages for p in parts):
                return f"{op_name(here)} may write {target.name} between the packed cache and the attention"
            if found is None:
                return f"{op_name(here)} may write {target.name}, whose memory is not known"
        here = here.next
    return None


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _other_readers(graph: fx.Graph, found: list[AttentionSite | Refusal]) -> list[Refusal]:
    """Packed caches that stay unpacked because something besides the found sites reads them."""
    sites = [m for m in found if isinstance(m, AttentionSite)]
    # Attentions that were refused said why already.
    known = {m.node for m in found if isinstance(m, Refusal) and m.packed}
    known |= {node for s in sites for node in (s.node, *s.between)}
    live = live_nodes(graph)
    refusals = []
    for unpack in filter(is_unpack, graph.nodes):
        inside = {unpack}.union(*(s.between for s in sites if s.unpack is unpack))
        users = [user for node in inside for user in node.users if user not in known and user in live]
        reader = next((r for user in users if (r := _reader(user, known)) is not None), None)
        if reader is not None:
            reason = f"unpack's tokens are used by {op_name(reader)}, not only by scaled_dot_product_attention"
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
        if not is_pure(here) or op_name(here) in NEW_KEYS:
            return here
        seen.add(here)
        stack += here.users
    return None
