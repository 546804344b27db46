"""What calibration inputs tell of a model: how its keys rotate, head groups, statistics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from apack_compile.calibration.collect import Collected, Observations, collect
from apack_compile.calibration.find_rotation import find_rotation
from apack_compile.calibration.host_memory import give_back
from apack_compile.config import DEFAULT_RATIO, AttentionPackConfig
from apack_compile.models.modality import placeholder_ids
from apack_compile.models.offload import computing_device
from apack_compile.models.weights import weight_bytes
from apack_compile.models.wrappers import adapters_of
from apack_compile.plan.choice import Groups, PackedLayers, Weights, alike, choose, head_groups_for
from apack_compile.plan.ranks import agreed_id
from apack_compile.plan.ring import block_for
from apack_compile.plan.rotation import BLOCK, KeyRotation
from apack_compile.plan.signature import kv_heads, query_heads
from apack_compile.plan.source import GRADIENTS, Calibration
from apack_compile.plan.time_model import OF_TYPE

# How keys rotate, or None; and why.
FoundRotation = tuple[KeyRotation | None, str]


def calibrate(
    model: nn.Module,
    layers: Mapping[int | None, Sequence[int]],
    batches: Sequence[Mapping[str, Any]],
    config: AttentionPackConfig,
    source: str,
) -> Calibration:
    """Fit what all requests share to model inputs, for the packed layers by window; raises ValueError for inputs that tell too little.

    source: what the inputs are, for the report.
    """
    with torch.inference_mode(False), torch.no_grad():
        config = replace(config, key_block=key_block_for(model, layers, config))
        found = rotations_of(model, layers, batches[0], config)
        rotation = rotation_by_layer(layers, found)
        seen = Observations(model, sorted(rotation), batches, rotation)
        return fitted_to(model, layers, seen, found, config, source)


def key_block_for(model: nn.Module, layers: Mapping[int | None, Sequence[int]], config: AttentionPackConfig) -> int:
    """Slots that share an anchor: as configured, or as the time model chooses, for heads as the model's configuration has them."""
    if config.key_block is not None:
        return config.key_block
    device = OF_TYPE.get(config.planned_device or computing_device(model).type)
    blocks = (BLOCK,) if device is None else device.key_blocks
    if len(blocks) == 1:
        return blocks[0]
    shapes = (
        PackedLayers(
            max(query_heads(model, i), kv_heads(model, i)[0]), *kv_heads(model, i), has_window=window is not None
        )
        for window, those in layers.items()
        for i in those
    )
    ratio, beside = config.ratio or DEFAULT_RATIO, weights_beside(model, config, weight_bytes(model))
    found = choose(alike(shapes), model.dtype.itemsize, ratio, None, device, beside, config.prefer, config.head_groups)
    return found.key_block


def weights_beside(model: nn.Module, config: AttentionPackConfig, weights: int) -> Weights:
    """What bases are weighed against; weights: bytes of the model's."""
    return Weights(weights, pictures=bool(placeholder_ids(model.config)), coarse=bool(config.coarse))


def rotations_of(
    model: nn.Module, layers: Mapping[int | None, Sequence[int]], batch: Mapping[str, Any], config: AttentionPackConfig
) -> dict[int | None, FoundRotation]:
    """How the keys of the packed layers rotate, and why, by window."""
    blocks = {w: config.key_block if w is None else block_for(w, config.key_block) for w in layers}
    return {window: find_rotation(model, layers[window], batch, blocks[window]) for window in layers}


def rotation_by_layer(
    layers: Mapping[int | None, Sequence[int]], found: Mapping[int | None, FoundRotation]
) -> dict[int, KeyRotation | None]:
    """How keys rotate, by layer."""
    return {layer: found[window][0] for window, those in layers.items() for layer in those}


def fitted_to(
    model: nn.Module,
    layers: Mapping[int | None, Sequence[int]],
    seen: Observations,
    found: Mapping[int | None, FoundRotation],
    config: AttentionPackConfig,
    source: str,
    weighed_by: str = GRADIENTS,
    gather: Callable[..., Collected] = collect,
) -> Calibration:
    """What observations tell of a model whose keys rotate so. gather: makes statistics of them."""
    weights = weight_bytes(model)
    groups = groups_for(model, config, packed_layers(model, seen, layers), weights)
    ranked = layers.get(None, ())
    coarse = config.coarse if ranked else ()
    # a pass over the inputs and a fit of the bases, and both again where coarse tokens are told from fine ones
    steps = len(seen.layers) * (len(seen.batches) + 1) * (2 if coarse else 1)
    with logging.tqdm(total=steps, desc="calibrating", unit=" layers", delay=1, leave=False, disable=None) as bar:
        collected = gather(seen, groups.count, coarse, ranked, bar.update)
    give_back()
    return Calibration(
        statistics=collected.statistics,
        rules=collected.rules,
        ranked=config.coarse,
        rotations={window: rotation for window, (rotation, _) in found.items()},
        rotation_reasons={window: reason for window, (_, reason) in found.items()},
        groups=groups,
        weight_bytes=weights,
        key_block=config.key_block,
        inputs=source,
        identity=agreed_id(model),
        adapters=adapters_of(model),
        without_gradients=collected.without_gradients,
        weighed_by=weighed_by,
    )


def packed_layers(
    model: nn.Module, seen: Observations, layers: Mapping[int | None, Sequence[int]]
) -> tuple[PackedLayers, ...]:
    """The layers that were observed, those that are alike as one; as many query heads as KV heads where no config says."""
    found = []
    for window, those in layers.items():
        for i in those:
            key = seen.first.states[i][0]
            heads, head_dim = key.shape[1], key.shape[3]
            found.append(
                PackedLayers(max(query_heads(model, i), heads), heads, head_dim, has_window=window is not None)
            )
    return alike(found)


def groups_for(model: nn.Module, config: AttentionPackConfig, layers: tuple[PackedLayers, ...], weights: int) -> Groups:
    """Head groups for such layers, on the model's device; weights: bytes of the model's weights."""
    if config.head_groups is not None:
        return Groups(config.head_groups, "as configured", layers, config.key_block)
    device, ratio = config.planned_device or computing_device(model).type, config.ratio or DEFAULT_RATIO
    beside = weights_beside(model, config, weights)
    return head_groups_for(layers, model.dtype, ratio, config.key_block, device, beside, config.prefer)
