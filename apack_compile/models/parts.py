"""The parts of a model that its generate may call with the cache."""

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from apack_compile.models.cache_argument import takes_cache


def generating_parts(model: nn.Module) -> list[nn.Module]:
    """The model, and the models inside of it that its own kind of generate may hand the cache to."""
    if type(model).generate is GenerationMixin.generate:
        return [model]
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def cache_users(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that may be called with its cache: those that generate, and the models inside of them."""
    decoders = (module for module in model.modules() if isinstance(module, PreTrainedModel) and takes_cache(module))
    return list(dict.fromkeys((*generating_parts(model), *decoders)))


def decoder_of(model: nn.Module) -> nn.Module:
    """The language model without its output head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def shares_cross_attention(part: nn.Module) -> bool:
    """Whether a model is a BERT-like decoder, which uses one cache layer for both its attentions."""
    return any(name.endswith(".crossattention") for name, _ in part.named_modules())
