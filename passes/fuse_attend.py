"""Replace unpack + head repetition + attention, in any spelling that `find_sites` accepts, by one `apack::attend`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from apack_compile.passes.base import Pass, Refusal
from apack_compile.passes.masks import one_mask
from apack_compile.passes.nodes import bind, default_overload
from apack_compile.passes.sites import AttentionSite, find_sites


@dataclass(frozen=True)
class FuseAttend(Pass):
    """Attend over the packed cache where the graph unpacks it first."""

    uses: ClassVar[tuple[str, ...]] = tuple(
        f"apack_compile.passes.{name}"
        for name in ("attention", "effects", "layout", "masks", "memory", "nodes", "origin", "scores", "sites")
    )

    def match(self, graph: fx.Graph) -> list[AttentionSite | Refusal]:
        """The graph's attention sites and refusals."""
        return find_sites(graph)

    def rewrite(self, graph: fx.Graph, matches: Sequence[Any]) -> int:
        """Put an `apack::attend` in each site's place; the unpack stays until dead code is removed."""
        for site in matches:
            found = site.attention
            with graph.inserting_before(site.node):
                mask = one_mask(graph, found.masks)
            given = bind(site.unpack, default_overload(site.unpack))
            given |= {"query": found.query, "mask": mask, "bias": None, "scale": found.scale}
            attend = torch.ops.apack.attend_tiers if given["tiers"] is not None else torch.ops.apack.attend
            # Cache state goes over by name: unpack and attend call it the same.
            named = {a.name: a.kwarg_only for a in attend.default._schema.arguments}
            arguments = tuple(given[name] for name, by_name in named.items() if not by_name)
            options = {name: given[name] for name, by_name in named.items() if by_name and given[name] is not None}
            with graph.inserting_before(site.node):
                node = graph.call_function(attend.default, arguments, options)
            # source_fn_stack would say that the node came from scaled_dot_product_attention.
            node.meta = {k: v for k, v in site.node.meta.items() if k != "source_fn_stack"}
            site.node.replace_all_uses_with(node)
            # Not left to dead code removal, which keeps a statement in place on the scores.
            for inner in (site.node, *reversed(found.interior)):
                graph.erase_node(inner)
        return len(matches)
