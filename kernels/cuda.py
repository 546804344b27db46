"""What serves CUDA tensors: Triton, imported when the first one arrives."""

from collections.abc import Callable
from typing import Any

# For the report: which implementation runs where.
CUDA_IMPLEMENTATION = "Triton: append, attend, attend_tiers, encode; unpack is the reference"


def on_cuda(name: str) -> Callable[..., Any]:
    """The Triton implementation of an operation, which imports it when called."""

    def serve(*arguments: Any) -> Any:
        if name == "append":
            from apack_compile.kernels.append.triton import append as implementation
        else:
            from apack_compile.kernels.attend.triton import attend as implementation
        return implementation(*arguments)

    return serve
