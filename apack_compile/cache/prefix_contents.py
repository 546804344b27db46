"""All that the cache of a prefix holds, as values that JSON has and tensors by name, and a cache made of them again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apack_compile.cache.accounting import unpacked_tensors
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.chunk_places import Shape
from apack_compile.cache.layer import CompactedLayer
from apack_compile.cache.layer_group import LayerGroup
from apack_compile.cache.packed_pair import PackedPair
from apack_compile.cache.prefix_checks import LayerCheck, check_group, tensor_named
from apack_compile.cache.prefix_values import GroupValues
from apack_compile.cache.shared_index import PrefixPlace, SharedTokens
from apack_compile.cache.sharing import branch_plan
from apack_compile.checks import counted
from apack_compile.kernels.state import KIND_NAMES, PackedState
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.file import digest, tensors_of, values_of
from apack_compile.plan.plan import Plan

# What a plan says of where it comes from, and not of what it stores.
ORIGIN = ("calibrated_on", "versions", "plan_id")
OF_PLAN = "plan."


def bases_digest(plan: Plan) -> str:
    """What tells plans apart that store tokens otherwise: by their streams, or by their bases."""
    plan = replace(plan, windows={})
    values = {name: x for name, x in values_of(plan).items() if name not in ORIGIN}
    return digest(json.dumps(values, sort_keys=True), tensors_of(plan))


def contents_of(cache: CompactedCache) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The groups of a prefix, and their tensors but for a plan's; raises ValueError where layers hold what is not packed."""
    beside = [i for i, layer in enumerate(cache.layers) if type(layer) is not CompactedLayer]
    if beside and any(x.numel() for x in unpacked_tensors(cache)):
        raise ValueError(
            f"prefix: layers {', '.join(map(str, beside))} hold what is not packed, which cannot be saved or moved"
        )
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    return [_group_values(group, number, tensors, names) for number, group in enumerate(cache.groups)], tensors


def _group_values(group: LayerGroup, number: int, tensors: dict[str, Tensor], names: dict[int, str]) -> dict[str, Any]:
    """A group; its tensors go among the others, each once: names are those of all, by id."""

    def name_of(x: Tensor, name: str) -> str:
        if id(x) not in names:
            names[id(x)], tensors[name] = name, x
        return names[id(x)]

    index = group.index
    plan = index.plan if index.prefix is None else index.prefix.plan
    names |= {id(x): name for x, name in _named_bases(plan)}
    layers = []
    for layer in group.layers:
        state = layer.state_at(layer.positions(), layer.rotations(), layer.cursor, every=True)
        flat, layout = state.flatten()
        given = zip(flat, state.layout.tensor_names(), strict=True)
        held = [name_of(x, f"layers.{layer.layer_idx}.{name}") for x, name in given]
        layers.append({"layer": layer.layer_idx, "origin": layer.origin, "layout": layout, "tensors": held})
    coordinates = {} if index.coordinates is None else vars(index.coordinates)
    return {
        "coordinates": {name: name_of(x, f"groups.{number}.{name}") for name, x in coordinates.items()},
        "window": group.window,
        "bases": bases_digest(plan),
        "prefix": None if index.prefix is None else index.prefix.tokens,
        "assigned": index.assigned,
        "capacity": index.capacity,
        "laid_out": list(index.laid_out),
        "floor": group.floor,
        "layers": layers,
    }


def check_bases(cache: CompactedCache, groups: list[GroupValues]) -> None:
    """Raise ValueError where the plans of an empty cache, which are chosen, did not pack a prefix."""
    if len(groups) != len(list(cache.groups)):
        raise ValueError(f"{counted(len(groups), 'group')} of layers, and {len(list(cache.groups))} here")
    for group, of_group in zip(cache.groups, groups, strict=True):
        if (group.window, bases_digest(group.index.plan)) != (of_group.window, of_group.bases):
            raise ValueError("packed with bases that are not this model's")


def fill(
    cache: CompactedCache, groups: list[GroupValues], tensors: Mapping[str, Tensor], tokens: int, dtype: torch.dtype
) -> None:
    """Make an empty cache, of whose plans this is a prefix of so many tokens, hold it; raises ValueError where it is damaged."""
    for group, of_group in zip(cache.groups, groups, strict=True):
        index, plan = group.index, group.index.plan
        check_group(of_group, plan, tensors, tokens)
        if of_group.prefix is not None:
            index.prefix, index.plan = PrefixPlace(of_group.prefix, plan), branch_plan(plan)
        index.assigned, index.capacity = of_group.assigned, of_group.capacity
        index.laid_out, group.floor = (of_group.laid_out[0], of_group.laid_out[1]), of_group.floor
        if of_group.coordinates:
            index.coordinates = TokenCoordinates(**{name: tensors[x] for name, x in of_group.coordinates.items()})
        wanted, there = [layer.layer_idx for layer in group.layers], [layer.layer for layer in of_group.layers]
        if wanted != there:
            raise ValueError(f"layers {there} are layers {wanted} here")
        of_plan = {name: x for x, name in _named_bases(plan)}
        places: list[Tensor] = []
        for layer, of_layer in zip(group.layers, of_group.layers, strict=True):
            flat = [tensor_named(name, of_plan if name in of_plan else tensors) for name in of_layer.tensors]
            state = PackedState.parse(flat, of_layer.layout)
            dense_dtype = layer.dense_dtype_of(dtype)
            LayerCheck(of_group, of_layer, state, plan, index.plan, tokens, dtype, dense_dtype).check()
            _fill_layer(layer, state, of_layer.origin, dtype)
            placed = [*index.positions, *index.rotations]
            if places and not all(x is y for x, y in zip(placed, places, strict=True)):
                raise ValueError(f"layer {layer.layer_idx}: places its tokens otherwise than layer {wanted[0]}")
            places = placed
        group.mark_positions()


def _named_bases(plan: Plan) -> Iterator[tuple[Tensor, str]]:
    """A plan's tensors and their names."""
    for i, bases in plan.bases.items():
        for stream, basis in zip(plan.layers[i].named, bases, strict=True):
            for part, x in basis._asdict().items():
                yield x, f"{OF_PLAN}{i}.{stream}.{part}"


def _fill_layer(layer: CompactedLayer, state: PackedState, origin: int, dtype: torch.dtype) -> None:
    """Make a layer hold a state."""
    index, heads = layer.index, state.first.key.shape[1]
    own = state.segments[-len(index.plan.segments) :]
    layer.shared = SharedTokens(state.segments[: -len(own)])
    layer.pairs = {KIND_NAMES[s.kind]: PackedPair(s.kind, s.key, s.value) for s in own}
    layer.first, layer.tail, layer.cursor, layer.origin = state.first, state.tail, state.cursor, origin
    index.positions = [state.first_positions, *(s.positions for s in own)]
    index.rotations = [s.rotations for s in own if s.rotations is not None]
    dims = state.first.key.shape[3], state.first.value.shape[3]
    layer.hold(Shape(1, heads, *dims, dtype, state.tail.key.device).offered, 1, heads, dtype, state.tail.key.device)
    layer.follow_tensors()
