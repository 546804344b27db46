"""What serves CUDA tensors: Triton, imported when the first one arrives."""

from typing import Any


def append(*arguments: Any, **options: Any) -> None:
    """`apack::append` in Triton."""
    from apack_compile.kernels.append.triton import append as in_triton

    return in_triton(*arguments, **options)


def attend(*arguments: Any, **options: Any) -> Any:
    """`apack::attend` and `apack::attend_tiers` in Triton."""
    from apack_compile.kernels.attend.triton import attend as in_triton

    return in_triton(*arguments, **options)


def pack(*arguments: Any, **options: Any) -> Any:
    """`apack::pack` in Triton."""
    from apack_compile.kernels.pack.triton import pack as in_triton

    return in_triton(*arguments, **options)
