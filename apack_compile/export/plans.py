"""Plans of a program's caches: for a byte budget from statistics, or those of a given plan."""

from collections.abc import Sequence

from apack_compile.checks import counted
from apack_compile.export.observe import Observed
from apack_compile.export.state import LOSSLESS, CachePlan
from apack_compile.passes.buffers.pairs import BufferPair
from apack_compile.passes.graph.nodes import value_of
from apack_compile.plan.bits import largest_ratio
from apack_compile.plan.budget import budget_plan
from apack_compile.plan.check import check_plan
from apack_compile.plan.plan import Plan
from apack_compile.plan.time_model import is_aligned


def budget_plans(seen: Observed, caches: Sequence[BufferPair], ratio: float) -> dict[int, CachePlan]:
    """Plans by cache number: caches of one length share the budget that `ratio` leaves them.

    Raises ValueError for a ratio that no plan can reach.
    """
    plans: dict[int, CachePlan] = {}
    for tokens in sorted({cache.key.size[2] for cache in caches}):
        alike = [cache for cache in caches if cache.key.size[2] == tokens]
        width = min(cache.key.size[1] * min(cache.key.size[3], cache.value.size[3]) for cache in alike)
        if ratio > largest_ratio(width):
            raise ValueError(
                f"ratio={ratio!r} is out of reach: the largest for KV width {width} is {largest_ratio(width):.1f}"
            )
        statistics = {cache.number: seen.statistics[cache.number] for cache in alike}
        limit = seen.basis_limit and seen.basis_limit * len(alike)
        aligned = is_aligned(value_of(caches[0].key.state).device.type)
        plan = budget_plan(statistics, ratio, tokens, 0.0, rotation=seen.rotation, basis_limit=limit, aligned=aligned)
        plans |= {cache.number: cache_plan(plan, cache.number) for cache in alike}
    return plans


def given_plans(plan: Plan, caches: Sequence[BufferPair], total: int) -> dict[int, CachePlan]:
    """A plan's layers by cache number, of `total` caches that the program has; raises ValueError for a plan that does not fit."""
    check_plan(plan, "plan")
    parts = plan.by_window.values()
    if any(part.per_request for part in parts):
        raise ValueError(
            "plan: fits bases to each cache; a program needs a plan whose bases are shared, as ratio=N makes it"
        )
    if any(part.layers_place_tokens for part in parts):
        raise ValueError("plan: orders or separates tokens by importance; make it with AttentionPackConfig(coarse=())")
    if any(part.has_coordinates for part in parts):
        raise ValueError(
            "plan: its keys rotate by several coordinates of a token, and a program does not say where its tokens are; "
            "make it with AttentionPackConfig(key_block=0)"
        )
    layers, plans = plan.every_layer, {}
    if len(layers) != total:
        raise ValueError(f"plan: packs {counted(len(layers), 'layer')}; the program has {counted(total, 'cache')}")
    for cache in caches:
        _, heads, _, width = cache.key.size
        found = (heads, width, str(value_of(cache.key.state).dtype))
        if found != plan.signature[1:]:
            raise ValueError(
                f"plan: made for (KV heads, head_dim, dtype) {plan.signature[1:]}; {cache.name} has {found}"
            )
        layer = layers[cache.number]
        plans[cache.number] = cache_plan(plan.of_layer(layer), layer)
    return plans


def cache_plan(plan: Plan, layer: int) -> CachePlan:
    """What a plan gives a layer's text: all tokens of a program are text."""
    streams, bases = plan.layers[layer], plan.bases.get(layer)
    key, value = LOSSLESS.bases if bases is None else bases[-2:]
    return CachePlan(
        (streams.text_key, streams.text_value),
        (key, value),
        plan.tail_slots,
        plan.first_tokens,
        plan.groups,
        plan.rotation,
    )
