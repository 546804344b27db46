"""How far attention may round numbers."""

import torch

from apack_compile.kernels import native

# What integers of two bytes lose, and queries of relative keys that are rounded to bfloat16.
WITH_BFLOAT16 = ("avx512_vnni_bf16", "avx512_amx")
COARSER = dict.fromkeys(("avx2_vnni", "avx512_vnni"), torch.float16) | dict.fromkeys(WITH_BFLOAT16, torch.bfloat16)


def eps_of(dtype: torch.dtype, instructions: int = native.INSTRUCTION_SET) -> float:
    """A dtype's rounding, or that of an instruction set where it is coarser; instructions: index into INSTRUCTION_SETS."""
    coarser = COARSER.get(native.INSTRUCTION_SETS[instructions], dtype)
    return max(torch.finfo(dtype).eps, torch.finfo(coarser).eps)
