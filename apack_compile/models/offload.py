"""Models whose weights accelerate keeps elsewhere between calls (`cpu_offload`, `disk_offload`, `device_map="auto"`)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def hooks_of(model: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on the parts of a model."""
    for module in model.modules():
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
