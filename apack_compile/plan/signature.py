"""What a plan, and a cache, must agree on with a model."""

from torch import nn

from apack_compile.checks import counted
from apack_compile.plan.rank_heads import heads_here

FULL_ATTENTION = "full_attention"


def signature_of(model: nn.Module) -> tuple:
    """What a cache must agree on with a model: layers, dtype, and this rank's KV heads and head_dim of the first full-attention layer."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or []
    full = types.index(FULL_ATTENTION) if FULL_ATTENTION in types else 0
    return (config.num_hidden_layers, *kv_heads(model, full), str(model.dtype))


def kv_heads(model: nn.Module, layer: int) -> tuple[int, int]:
    """This rank's KV heads of a layer, and their head_dim."""
    config = model.config.get_text_config(decoder=True)
    own = config.per_layer_config[layer] if config.is_heterogeneous else config
    heads = getattr(own, "num_key_value_heads", None) or getattr(own, "num_attention_heads", None)
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    return heads_here(model, layer, heads), head_dim


def query_heads(model: nn.Module, layer: int) -> int:
    """This rank's query heads of a layer; 0 where no configuration says."""
    config = model.config.get_text_config(decoder=True)
    own = config.per_layer_config[layer] if config.is_heterogeneous else config
    heads = getattr(own, "num_attention_heads", None) or 0
    return heads_here(model, layer, heads)


def describe(signature: tuple) -> str:
    """A signature in words."""
    layers, heads, head_dim, dtype = signature
    return f"{counted(layers, 'layer')}, {counted(heads, 'KV head')} x {head_dim}, {dtype}"
