"""A small LLaVA, a draft model that often agrees with it, and greedy generation."""

from typing import Any

import torch
from vlms import build, prompt

import apack_compile


def llava() -> Any:
    """The model."""
    return build("llava")[0]


def draft() -> Any:
    """The same model with disturbed weights."""
    model, generator = llava(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def picture(*rows: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with pictures: each row lists the lengths of text around them."""
    return prompt("llava", list(rows or ([30, 20],)), 4, seed)


def calibrated(model: Any, compile: str = "none", **setting: Any) -> Any:
    """The model, optimized and, where a ratio asks for it, calibrated."""
    apack_compile.optimize(model, compile=compile, **setting, min_tokens=0)
    if "ratio" in setting:
        apack_compile.calibrate(model, picture([200, 100, 150], seed=5))
    return model


def greedy(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 24, **settings: Any) -> Any:
    """What generate gives without sampling."""
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)
