"""Gradients through linear layers that torchao quantized.

Layers that quantize what they are given as well (int8dq) round it, so nothing flows back, and others have no backward at all. Here
their backward is that of the dequantized weight, one layer's at a time: rounding counts as the identity.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn


class StraightThrough(torch.autograd.Function):
    """A linear layer's output as it is, with the gradient of `states @ weight.T`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None, None


def is_torchao_linear(module: nn.Module) -> bool:
    """Whether torchao quantized the weight of a linear layer."""
    return isinstance(module, nn.Linear) and type(module.weight).__module__.startswith("torchao.")


@contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """In this thread, gradients pass the model's linear layers that torchao quantized."""
    thread = get_ident()
    given: dict[nn.Module, Tensor] = {}

    def detach(module: nn.Module, args: tuple) -> tuple | None:
        if get_ident() != thread or not torch.is_grad_enabled() or not args[0].requires_grad:
            return None
        given[module] = args[0]
        return (args[0].detach(), *args[1:])

    def attach(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        states = given.pop(module, None) if get_ident() == thread else None
        return None if states is None else StraightThrough.apply(states, output, module.weight)

    layers = [module for module in model.modules() if is_torchao_linear(module)]
    handles = [layer.register_forward_pre_hook(detach) for layer in layers]
    handles += [layer.register_forward_hook(attach) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
