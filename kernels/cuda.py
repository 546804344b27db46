"""What serves CUDA tensors: Triton, imported when the first one arrives; the references where keys are relative."""

from typing import Any

from apack_compile.kernels.append import reference as append_reference
from apack_compile.kernels.attend import reference as attend_reference


def append(*arguments: Any, **turns: Any) -> None:
    """`apack::append` in Triton."""
    if turns.get("text_turns") is not None:
        return append_reference.append(*arguments, **turns)
    from apack_compile.kernels.append.triton import append as in_triton

    return in_triton(*arguments)


def attend(*arguments: Any, **turns: Any) -> Any:
    """`apack::attend` and `apack::attend_tiers` in Triton."""
    if turns.get("vision_turns") is not None or turns.get("text_turns") is not None:
        return attend_reference.attend(*arguments, **turns)
    from apack_compile.kernels.attend.triton import attend as in_triton

    return in_triton(*arguments)
