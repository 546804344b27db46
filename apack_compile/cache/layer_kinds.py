"""What each layer of a model's cache gets: packed tokens, or transformers' own layer, and why."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from apack_compile.cache.kept_layers import CROSS_ATTENTION, kept_layer
from apack_compile.cache.packed_layers import PACKED_LAYERS, can_compile
from apack_compile.models.parts import generating_parts, shares_cross_attention
from apack_compile.plan.plan import Plan
from apack_compile.plan.signature import FULL_ATTENTION

LATENT_ATTENTION = "latent_attention"
# How often layers are read that a forward pass reads again, as configs call it.
LOOPS = ("loop_num_passes", "n_recurrent_loops")
# Layers with a linear attention or a short convolution alone.
LINEAR = ("linear_attention", "conv")


@dataclass(frozen=True)
class LayerKind:
    """What a layer of the model gets: `reason` is None when it is packed, else why it keeps transformers' own layer.

    compileable: whether a decode step over it can be compiled. has_keys: whether it holds keys and values of its own. window: newest
    tokens that a query sees, itself included; None for all.
    """

    layer: int
    layer_type: str
    reason: str | None
    compileable: bool = True
    has_keys: bool = True
    window: int | None = None


def layer_kinds(model: nn.Module) -> list[LayerKind]:
    """What each layer of the model's cache gets; raises ValueError for a model without a KV cache."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"model: {name} has no decoder-only KV cache that could be packed: an encoder reads pictures and prompt"
        )
    if not layers:
        raise ValueError(f"model: {name} has no decoder-only KV cache that could be packed: its config names no layers")
    passes = max(getattr(config, loops, None) or 1 for loops in LOOPS)
    if passes > 1:
        raise ValueError(
            f"model: {name} reads some layers {passes} times and adds layers to its cache for that, which are not packed"
        )
    types = list(getattr(config, "layer_types", None) or [FULL_ATTENTION] * len(layers))[: len(layers)]
    crossing = [type(part).__name__ for part in generating_parts(model)[1:] if shares_cross_attention(part)]
    if crossing:
        raise ValueError(f"model: {crossing[0]} keeps what it attends to across in the layers of its own tokens")
    if getattr(config, "kv_lora_rank", None):
        types = [LATENT_ATTENTION if has_keys(layer) else kind for kind, layer in zip(types, layers, strict=True)]
    for i in getattr(config, "cross_attention_layers", None) or ():
        types[i] = CROSS_ATTENTION
    kinds = []
    for i, (kind, layer) in enumerate(zip(types, layers, strict=True)):
        reason = reason_of(kind, layer)
        compileable = can_compile(layer) if reason is None else bool(kept_layer(layer, kind).is_compileable)
        kinds.append(LayerKind(i, kind_name(kind, layer), reason, compileable, has_keys(layer), window_of(layer)))
    return kinds


def planned_kinds(kinds: list[LayerKind], plan: Plan) -> list[LayerKind]:
    """Kinds of layers with a given plan: those with a window are packed where it has them."""
    left = "the plan given has no streams for it; plan_for gives one with those of all layers"
    return [
        replace(kind, reason=f"{kind.layer_type}: {left}", compileable=False)
        if kind.window is not None and kind.layer not in plan.every_layer
        else kind
        for kind in kinds
    ]


def kind_name(layer_type: str, layer: Any) -> str:
    """The config's name of a layer, corrected where its cache layer says it slides."""
    return "sliding_attention" if getattr(layer, "is_sliding", False) and layer_type == FULL_ATTENTION else layer_type


def reason_of(layer_type: str, layer: Any) -> str | None:
    """Why a layer keeps transformers' own cache layer; None when it is packed."""
    kept = f"transformers' {type(layer).__name__} is kept"
    if layer_type == CROSS_ATTENTION:
        return f"{layer_type}: written once, from the pictures; {kept}"
    if layer_type == LATENT_ATTENTION:
        return f"{layer_type}: what is cached is latent already; {kept}"
    if not has_keys(layer):
        held = "a state of one size for any number of tokens" if layer_type in LINEAR else "nothing of its own"
        return f"{layer_type}: holds {held}, no keys and values"
    return None if type(layer) in PACKED_LAYERS else f"{kind_name(layer_type, layer)}: {kept}"


def has_keys(layer: Any) -> bool:
    """Whether a layer of transformers' cache holds keys and values of its own: no linear states alone, no readers of another layer's."""
    return isinstance(layer, CacheLayerMixin)


def window_of(layer: Any) -> int | None:
    """Newest tokens that a query of a layer sees, itself included; None for all."""
    return getattr(layer, "sliding_window", None) if type(layer) in PACKED_LAYERS else None
