"""Models whose weights accelerate keeps elsewhere between calls (`cpu_offload`, `disk_offload`, `device_map="auto"`)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from apack_compile.models.parts import decoder_of


def hooks_of(model: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on the parts of a model."""
    for module in model.modules():
        yield from hooks_on(module)


def hooks_on(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on one module."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate brings a model's weights to where it computes call by call."""
    return any(getattr(hook, "offload", False) for hook in hooks_of(model))


def computing_device(model: nn.Module) -> torch.device:
    """Where a model computes: where its weights are, unless accelerate's hooks bring them to an accelerator or to the CPU."""
    places = [getattr(hook, "execution_device", None) for hook in hooks_of(model)]
    devices = [torch.device(place) for place in places if place is not None]
    return next((device for device in devices if device.type != "cpu"), devices[0] if devices else model.device)


def check_one_device(model: nn.Module) -> None:
    """Raise ValueError where accelerate has layers of the language model compute on several devices: a packed cache is on one."""
    places = {
        str(torch.device(hook.execution_device))
        for name, module in decoder_of(model).named_modules()
        if any(part.isdigit() for part in name.split("."))
        for hook in hooks_on(module)
        if getattr(hook, "execution_device", None) is not None
    }
    if len(places) > 1:
        raise ValueError(
            f"model: its layers compute on {', '.join(sorted(places))} (device_map), and a packed cache is on one device; share the model "
            "by tensor parallelism (tp_plan='auto', one process a device), or load it to one accelerator with what does not fit offloaded: "
            "device_map='auto', max_memory={0: ..., 'cpu': ...}"
        )
