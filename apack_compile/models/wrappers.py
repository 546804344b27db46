"""What stands around a transformers model, and the adapters in it."""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationMixin

# Of PEFT's methods, those that hand the model a cache of their own, which holds their prefix.
PREFIX_METHODS = ("PREFIX_TUNING", "CARTRIDGE")


def unwrapped(model: Any) -> Any:
    """The model whose generate a PEFT model or a `torch.compile`d one calls, or the one in DistributedDataParallel; else as it is."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif _is_peft(model) and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        elif _is_peft(model) and isinstance(getattr(model, "model", None), nn.Module):
            model = model.model
        else:
            return model


def inner_model(model: Any) -> str:
    """Where inside of something a model is that can be optimized, to be added to a message; empty where there is none."""
    if isinstance(model, nn.Module):
        parts = ((name, part) for name, part in model.named_modules() if name)
    else:
        parts = ((name, getattr(model, name, None)) for name in ("model",))
    found = next(((name, part) for name, part in parts if isinstance(part, GenerationMixin)), None)
    return "" if found is None else f"; pass its .{found[0]}, a {type(found[1]).__name__}"


class PreparedInputs:
    """What optimize puts in the place of a class's `prepare_inputs_for_generation`; of a type that no other function on a model has."""

    def __init__(self, function: Callable) -> None:
        # for generate, which looks at the arguments
        update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def prepares_otherwise(model: nn.Module) -> bool:
    """Whether a user's or another's function prepares the inputs of a model's steps; PEFT leaves the model's own behind, bound to it."""
    replaced = vars(model).get("prepare_inputs_for_generation")
    if replaced is None or getattr(replaced, "__self__", None) is not model:
        return replaced is not None
    function = getattr(replaced, "__func__", None)
    return function is not type(model).prepare_inputs_for_generation and not isinstance(function, PreparedInputs)


def own_cache_of_adapter(model: nn.Module) -> str | None:
    """Why an adapter around a model lets no packed cache reach it; None where none does."""
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    method = getattr(getattr(owner, "active_peft_config", None), "peft_type", None)
    method = getattr(method, "value", method)
    return f"PEFT's {method} hands the model a cache of its own, with its prefix" if method in PREFIX_METHODS else None


def adapters_of(model: nn.Module) -> tuple[tuple[str, str, tuple[tuple[str, float | None], ...]], ...]:
    """The adapters that change what a model computes: where they are, their kind, which are active, and how much each is scaled."""
    found = []
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if _is_peft(module) and active is not None and not callable(active):
            chosen = () if getattr(module, "disable_adapters", False) else tuple(active)
            scales = getattr(module, "scaling", {})
            found.append((name, type(module).__name__, tuple((adapter, scales.get(adapter)) for adapter in chosen)))
    return tuple(found)


def _is_peft(model: Any) -> bool:
    return type(model).__module__.split(".")[0] == "peft"
