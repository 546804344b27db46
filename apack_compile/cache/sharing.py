"""A cache's packed tokens as a prefix that all rows of its branches share."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer import NO_ROTATIONS, CompactedLayer
from apack_compile.cache.layer_group import LayerGroup
from apack_compile.cache.shared_index import PrefixPlace, SharedTokens
from apack_compile.kernels.state import Segment
from apack_compile.models.inference_mode import outside_inference_mode
from apack_compile.plan.plan import Plan


def why_not_shared(plan: Plan) -> str | None:
    """Why caches with a plan cannot share a prefix; None where they can."""
    if plan.tiers is not None:
        name = getattr(plan.tiers, "name", None)
        return f"preset={name!r} ranks and drops a row's tokens by its own attention"
    return "bases are fitted to the tokens of each row (preset='attentionpack')" if plan.per_request else None


def branch_plan(plan: Plan) -> Plan:
    """The plan of a branch's own tokens, behind a prefix that a plan packed: none of them are coarse, because they are few."""
    layers = {i: replace(streams, coarse_key=None, coarse_value=None) for i, streams in plan.layers.items()}
    bases = {i: own[-len(layers[i].streams) :] for i, own in plan.bases.items()}
    return replace(plan, layers=layers, bases=bases, coarse=None)


@outside_inference_mode
def share(cache: CompactedCache) -> None:
    """Make what a cache of one row holds a prefix: its packed and first tokens are of all rows that it will have, and never written.

    Layers with a window keep theirs, which every row will have by itself. Raises ValueError where rows cannot share tokens.
    """
    cache.check_whole()
    if not cache.is_filled:
        raise ValueError("prefix: the cache holds no tokens; read a prompt with it")
    if cache.groups.is_branch:
        raise ValueError("prefix: the cache is one already, or a branch of one")
    if cache.batch_size != 1:
        raise ValueError(f"prefix: one prompt is read at a time; the cache holds {cache.batch_size}")
    for plan in cache.groups.plans:
        if (why := why_not_shared(plan)) is not None:
            raise ValueError(f"prefix: {why}; use ratio=, or preset='lossless'")
    for group in cache.groups:
        if group.window is None:
            _share_group(group)


def _share_group(group: LayerGroup) -> None:
    """The same of the layers that see all tokens."""
    index, plan, first = group.index, group.index.plan, group.layers[0].positions()[0]
    held, packed, _ = group.layers[0].cursor.tolist()
    # one tensor for all layers that have the same places
    common = None if plan.layers_place_tokens else _places(group.layers[0], packed)
    for layer in group.layers:
        _share_layer(layer, packed, common or _places(layer, packed))
    index.prefix, index.plan = PrefixPlace(held, plan), branch_plan(plan)
    index.positions = [first, *(first.new_empty(1, 0) for _ in index.plan.segments)]
    if index.coordinates is not None:
        # the tail's tokens and those to come count up
        index.coordinates = replace(index.coordinates, known=index.coordinates.known[:, :0])
    group.follow_positions()
    for layer in group.layers:
        layer.pairs = {name: layer.pairs[name] for name in index.plan.segments}
        layer.follow_tensors()
    index.assigned, index.laid_out, group.floor = packed, (held, packed), held


def _places(layer: CompactedLayer, packed: int) -> list[Tensor]:
    """Positions of a layer's packed tokens, those before position `packed`."""
    _, *others, text = layer.positions()
    return [*others, text[:, : packed - layer.origin]]


def _leading(x: Tensor, used: int) -> Tensor:
    """The leading slots, in memory of their own."""
    return x[:, :, :used].clone(memory_format=torch.contiguous_format)


def _share_layer(layer: CompactedLayer, packed: int, positions: Sequence[Tensor]) -> None:
    """Make the packed tokens of a layer's one row, which are at these positions and before `packed`, those of all rows to come."""
    segments, own = [], {}
    for (name, pair), where, by in zip(layer.pairs.items(), positions, layer.rotations() or NO_ROTATIONS, strict=False):
        used = where.shape[1]
        kept = pair if used == pair.slots else pair.with_tokens(partial(_leading, used=used))
        if used:
            segments.append(Segment(pair.kind, kept.key, kept.value, where, by))
        own[name] = pair.with_tokens(partial(_leading, used=0))
    layer.shared, layer.pairs = SharedTokens(tuple(segments)), own
    layer.own_positions, layer.own_rotations = [], []
    layer.move_origin(packed)


@outside_inference_mode
def branch_of(cache: CompactedCache, rows: int, expected_tokens: int) -> CompactedCache:
    """A cache of so many rows that go on behind a prefix, with room for so many tokens; the prefix is the same memory."""
    frozen: list[Any] = [*cache.groups.plans, *(x for layer in cache.packed_layers for x in layer.basis_tensors())]
    for group in cache.groups:
        if group.index.prefix is not None:
            frozen += [group.index.positions[0], *(layer.first for layer in group.layers)]
    branch = copy.deepcopy(cache, {id(x): x for x in frozen})
    branch.groups.expected_tokens = expected_tokens
    branch.batch_repeat_interleave(rows)
    branch.groups.make_room()
    return branch
