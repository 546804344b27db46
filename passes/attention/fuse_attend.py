"""Replace unpack + head repetition + attention, in any spelling that `find_sites` accepts, by one `apack::attend`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from apack_compile.kernels.state import Layout
from apack_compile.passes.attention.components import deinterleaved_node
from apack_compile.passes.attention.masks import one_mask
from apack_compile.passes.attention.sites import AttentionSite, find_sites
from apack_compile.passes.base import Pass, Refusal
from apack_compile.passes.graph.nodes import bind, default_overload, value_of


@dataclass(frozen=True)
class FuseAttend(Pass):
    """Attend over the packed cache where the graph unpacks it first."""

    def match(self, graph: fx.Graph) -> list[AttentionSite | Refusal]:
        """The graph's attention sites and refusals."""
        return find_sites(graph)

    def rewrite(self, graph: fx.Graph, matches: Sequence[Any]) -> int:
        """Put an `apack::attend` in each site's place; the unpack stays until dead code is removed."""
        replaced: dict[fx.Node, fx.Node] = {}
        for site in matches:
            # An earlier attention's result may be this one's query: its node is gone by now.
            query = replaced.get(site.attention.query, site.attention.query)
            with graph.inserting_before(site.node):
                replaced[site.node] = node = _attend(graph, site, query)
            # source_fn_stack would say that the node came from scaled_dot_product_attention.
            node.meta = {k: v for k, v in site.node.meta.items() if k != "source_fn_stack"}
            site.node.replace_all_uses_with(node)
            # Not left to dead code removal, which keeps a statement in place on the scores.
            for inner in (site.node, *reversed(site.attention.interior)):
                graph.erase_node(inner)
        return len(matches)


def _attend(graph: fx.Graph, site: AttentionSite, query: fx.Node) -> fx.Node:
    """The `apack::attend` of a site, at the graph's insertion point."""
    given = bind(site.unpack, default_overload(site.unpack))
    # The packed cache has its keys in halves; unpack interleaves them again, attend takes a query in halves too.
    query = deinterleaved_node(graph, query, Layout.parse(given["layout"]).interleaved_pairs)
    # Inside of autocast, query and result may have other dtypes than the cache.
    cached, result = (value_of(node).dtype for node in (site.attention.key, site.node))
    if value_of(site.attention.query).dtype != cached:
        query = graph.call_method("to", (query, cached))
    mask = one_mask(graph, site.attention.masks)
    if site.grouped:
        query, mask = (graph.call_method("flatten", (node, 1, 2)) for node in (query, mask))
    given |= {"query": query, "mask": mask, "scale": site.attention.scale}
    attend = torch.ops.apack.attend_tiers if given["tiers"] is not None else torch.ops.apack.attend
    # Cache state goes over by name: unpack and attend call it the same.
    arguments = tuple(given[argument.name] for argument in attend.default._schema.arguments)
    out = graph.call_function(attend.default, arguments)
    out = graph.call_method("to", (out, result)) if result != cached else out
    return graph.call_method("unflatten", (out, 1, (-1, site.groups))) if site.grouped else out
