"""The cache among the arguments of a forward pass: `cache` from transformers 5.24 on, `past_key_values` before and in older models."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache

# The first that is given counts, as it does for transformers.
NAMES = ("cache", "past_key_values")


def cache_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The cache that a call is given, by either name or by position; None where it is given none."""
    for name in NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    # by type, not by the signature: Dynamo traces this
    return next((argument for argument in args if isinstance(argument, Cache)), None)


def with_cache(model: nn.Module, inputs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Keyword arguments of a forward pass with this cache, under the model's name for it, in the place of any other."""
    return {**{name: x for name, x in inputs.items() if name not in NAMES}, cache_name(model): cache}


def cache_name(model: nn.Module) -> str:
    """What a model's forward calls its cache; transformers' own name where no signature says."""
    for names in _parameters(model):
        for name in NAMES:
            if name in names:
                return name
    return OWN_NAME


def takes_cache(model: nn.Module) -> bool:
    """Whether a model's forward has a parameter for a cache."""
    return any(takes_argument(model, name) for name in NAMES)


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has a parameter of this name."""
    return any(name in names for names in _parameters(model))


def named_arguments(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a forward pass by their names."""
    if not args:
        return dict(kwargs)
    names = next((names for names in _parameters(model) if len(names) >= len(args)), [])
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _parameters(model: nn.Module) -> Iterator[list[str]]:
    """Names of the parameters of a model's forward, then of those of its base classes: what `*args, **kwargs` are handed on to."""
    yield _names(model.forward)
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            yield _names(vars(kind)["forward"])[1:]


def _names(function: Callable) -> list[str]:
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, x in inspect.signature(function).parameters.items() if x.kind not in various]


# What `generate` calls it, and hands to every forward.
OWN_NAME = next(name for name in NAMES if name in _names(GenerationMixin.prepare_inputs_for_generation))
