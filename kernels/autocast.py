"""What packs tokens is computed in the dtypes it asks for, also inside of the caller's torch.autocast."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function compute as if it were called outside of torch.autocast."""

    @wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return called
