"""Changes of a cache that its inference-mode callers make."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference_mode(change: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a change of the cache leave ordinary tensors: those of inference mode could not be written after it."""

    @wraps(change)
    def changed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return change(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return change(*args, **kwargs)

    return changed
