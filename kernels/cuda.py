"""What serves CUDA tensors: Triton, imported when the first one arrives; the references where keys are relative."""

from typing import Any

from apack_compile.kernels.append import reference as append_reference
from apack_compile.kernels.attend import reference as attend_reference


def append(*arguments: Any, text_turns: Any = None, block: int = 0) -> None:
    """`apack::append` in Triton."""
    if text_turns is not None:
        return append_reference.append(*arguments, text_turns=text_turns, block=block)
    from apack_compile.kernels.append.triton import append as in_triton

    return in_triton(*arguments)


def attend(*arguments: Any, vision_turns: Any = None, text_turns: Any = None, block: int = 0) -> Any:
    """`apack::attend` and `apack::attend_tiers` in Triton."""
    if vision_turns is not None or text_turns is not None:
        return attend_reference.attend(*arguments, vision_turns=vision_turns, text_turns=text_turns, block=block)
    from apack_compile.kernels.attend.triton import attend as in_triton

    return in_triton(*arguments)
