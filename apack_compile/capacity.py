"""How many requests fit in a number of bytes: what packed caches hold, worked out from their plans without a forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from apack_compile.cache.accounting import shared_tensors, storage_bytes
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.chunk_places import Before, Shape
from apack_compile.cache.layer import CompactedLayer
from apack_compile.cache.layer_groups import LayerGroups
from apack_compile.cache.layer_kinds import LINEAR
from apack_compile.cache.packed_pair import codings, empty_pair
from apack_compile.generate.session import DEFAULT_NEW_TOKENS, Session
from apack_compile.kernels.format import Bands
from apack_compile.kernels.state import KIND_NAMES
from apack_compile.plan.plan import FIRST_TOKENS, FITTED_SCOPES, Plan
from apack_compile.plan.signature import kv_heads

# What is counted although a model was made for less: seconds of work.
MOST_TOKENS = 2**20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of packed caches: `shared` by all requests, of each `batch` whatever its size, and of each `request` in it."""

    shared: int
    batch: int
    request: int

    def requests_in(self, budget: int) -> int:
        """How many requests of one batch fit in so many bytes."""
        return max((budget - self.shared - self.batch) // self.request, 0)


def cache_bytes(model: nn.Module, session: Session, tokens: int, vision_share: float) -> CacheBytes:
    """Bytes of the caches of prompts of `tokens` tokens; the vision ones come behind the first tokens.

    Raises ValueError where a plan alone does not say what a cache holds, RuntimeError where calibration is still to come.
    """
    _check_kinds(session)
    _check_length(model, tokens)
    session.follow(model)
    own = DynamicCache(config=model.config.get_text_config(decoder=True))
    # plans that are made to be counted are not the session's newest ones
    source = replace(session.source, made=dict(session.source.made))
    cache = CompactedCache(session.kinds, own, source, DEFAULT_NEW_TOKENS)
    groups, vision = cache.groups, np.zeros((1, tokens), bool)
    pictures = round(tokens * vision_share)
    first = min(FIRST_TOKENS, tokens - pictures)
    vision[:, first : first + pictures] = True
    padding = np.zeros_like(vision)
    groups.choose_plans(vision, padding)
    _check_countable(cache)
    shared = storage_bytes(tensor for plan in groups.plans for tensor in shared_tensors(plan))
    for group in groups:
        group.index.plan = group.index.plan.to(CPU)
    groups.follow_coordinates(torch.arange(tokens)[None], torch.from_numpy(padding), 0)
    heads, key, value = _state_of(model, groups[0].index.plan, cache.packed_layers[0].layer_idx)
    shape = Shape(1, heads, key, value, model.dtype, CPU)
    groups.lay_out((vision, padding), [Before.of([])] * len(groups.plans), shape)
    request, batch = storage_bytes(_shared_by_layers(groups)), 0
    for group in groups:
        for layer in group.layers:
            request += _layer_bytes(layer, model.dtype, *_state_of(model, group.index.plan, layer.layer_idx))
            batch += group.index.chunk.cursor.nbytes
    return CacheBytes(shared, batch, request)


def _check_length(model: nn.Module, tokens: int) -> None:
    """Raise ValueError for more tokens than a prompt has: they are laid out one by one."""
    known = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
    most = max(known, MOST_TOKENS)
    if tokens > most:
        raise ValueError(f"tokens={tokens} must be at most {most}; the model was made for {known or 'any number'}")


def _check_kinds(session: Session) -> None:
    """Raise ValueError for layers that stay as transformers has them and hold something."""
    for kind in session.kinds:
        if kind.reason is not None and (kind.has_keys or kind.layer_type in LINEAR):
            raise ValueError(
                f"model: layer {kind.layer} ({kind.layer_type}) is not packed, and what it holds is known only when the model runs; "
                "models whose layers are all packed can be counted"
            )


def _check_countable(cache: CompactedCache) -> None:
    """Raise ValueError where what a cache holds depends on more than the number of its tokens."""
    for layer in cache.packed_layers:
        if type(layer) is not CompactedLayer:
            raise ValueError(
                f"model: layer {layer.layer_idx} keeps more than keys and values, and how much is known only when the model runs; "
                "models whose layers are all packed can be counted"
            )
    for plan in cache.groups.plans:
        rule: Any = plan.tiers
        if rule is not None and rule.pools:
            raise ValueError(
                f"model: preset={rule.name!r} drops tokens by their attention, so what a cache holds depends on the prompt; "
                "a ratio, and presets that keep every token, can be counted"
            )
        if any(stream.scope == "batch" for layer in plan.layers.values() for stream in layer.streams):
            raise ValueError(
                "model: basis='batch' shares bases among the requests of a batch, so a request's bytes depend on the others; "
                "basis='sequence' can be counted"
            )


def _state_of(model: nn.Module, plan: Plan, layer: int) -> tuple[int, int, int]:
    """KV heads of a layer, and the width of a key and of a value."""
    heads, head_dim = kv_heads(model, layer)
    bases = plan.bases.get(layer)
    if not bases:
        return heads, head_dim, head_dim
    key, value = (plan.groups * basis.mean.shape[-1] // heads for basis in bases[:2])
    return heads, key, value


def _shared_by_layers(groups: LayerGroups) -> Iterator[Tensor]:
    """What is stored of a request once for the layers of a group."""
    for group in groups:
        yield from (*group.index.positions, *group.index.rotations)
        yield from vars(group.index.coordinates).values()
    yield from groups.history or ()


def _layer_bytes(layer: CompactedLayer, dtype: torch.dtype, heads: int, *dims: int) -> int:
    """Bytes of a request in one layer, without its cursor; `dims`: width of a key and of a value."""
    index, chunk = layer.index, layer.index.chunk
    key, value = (torch.empty(1, heads, 0, dim, dtype=dtype) for dim in dims)
    layer.lazy_initialization(key, value)
    where, own = chunk.segments, []
    if chunk.coarse is not None:
        # which tokens are coarse depends on the states, how many does not
        tokens = chunk.chunk.vision.shape[1]
        states = (torch.zeros(1, 1, 1, 1, dtype=dtype).expand(1, heads, tokens, dim) for dim in dims)
        placed = chunk.coarse.of_layer(layer.layer_idx, *states)
        where, own = placed.segments, [chunk.first_positions.clone(), *placed.positions, *placed.rotations]
    if layer.tiers is not None:
        kinds = {KIND_NAMES.index(segment): taken for segment, taken in where.items()}
        layer.tiers.lay_out(index.positions, kinds, chunk)
        own += layer.tiers.tensors()
    dense = (chunk.first.slots + chunk.tail.slots) * heads * sum(dims) * layer.dense_dtype.itemsize
    packed = sum(_segment_bytes(layer, segment, taken.slots, key, value) for segment, taken in where.items())
    return dense + packed + storage_bytes(own)


def _segment_bytes(layer: CompactedLayer, segment: str, tokens: int, key: Tensor, value: Tensor) -> int:
    """Bytes of a request's tokens in a packed segment, free slots and bases of its own included; key, value: `[1, H_kv, 0, D]`."""
    plan, chunk = layer.index.plan, layer.index.chunk
    planned = plan.layers[layer.layer_idx].pair(segment)
    if planned[0].scope in FITTED_SCOPES:
        widths = (states.shape[1] * states.shape[3] // plan.groups for states in (key, value))
        return sum(
            plan.groups * _fitted_bytes(how.bands.at_most(tokens), tokens, width)
            for how, width in zip(planned, widths, strict=True)
        )
    spare = chunk.spare if segment == "text" and not plan.per_request else 0
    both = codings(plan, layer.layer_idx, segment, layer.dense_dtype, chunk.identity)
    pair = empty_pair(KIND_NAMES.index(segment), both, plan, layer.layer_idx, key, value)
    return storage_bytes(pair.with_more_slots(tokens + spare).tensors)


def _fitted_bytes(bands: Bands, tokens: int, width: int) -> int:
    """Bytes of a head group's codes with the basis that is fitted to them: mean and rows in 16 bits, steps in 32."""
    return tokens * bands.token_bytes + 2 * width * (1 + bands.components) + 4 * bands.components
