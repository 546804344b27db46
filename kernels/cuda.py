"""What serves CUDA tensors: Triton, imported when the first one arrives."""

from typing import Any

# For the report: which implementation runs where.
CUDA_IMPLEMENTATION = "Triton: append, attend, attend_tiers, encode; unpack is the reference"


def append(*arguments: Any) -> None:
    """`apack::append` in Triton."""
    from apack_compile.kernels.append.triton import append as in_triton

    in_triton(*arguments)


def attend(*arguments: Any) -> Any:
    """`apack::attend` and `apack::attend_tiers` in Triton."""
    from apack_compile.kernels.attend.triton import attend as in_triton

    return in_triton(*arguments)
