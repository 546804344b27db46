"""How far results may be from float64, as a share of the largest one."""

import torch

from apack_compile.kernels import native

# Codes of two and four bits lose a tenth to a quarter of a component; integers add a tenth of that (tests/kernels/test_attend_integers.py).
INTEGERS = 1 / 50


def eps_of(dtype: torch.dtype, instructions: int = native.INSTRUCTION_SET) -> float:
    """A dtype's rounding, or what attention in integers loses where it does more; instructions: index into INSTRUCTION_SETS."""
    eps = torch.finfo(dtype).eps
    return max(eps, INTEGERS) if native.has_integers(instructions) else eps
