"""The compiled operations for CPUs: where they were built, and what they need of the processor.

`pip install` builds `_native` where there is a C++ compiler with OpenMP, and goes on without it elsewhere; then the
references serve the CPU, and the report says so. The functions take addresses only: nothing in them depends on torch's ABI.
"""

import ctypes
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


def find_library() -> Path | None:
    """The file of the compiled operations, or None where they were not built."""
    folder = Path(__file__).parent
    return next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").is_file()), None)


def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled operations, or None and why not."""
    path = find_library()
    if path is None:
        return None, "not built"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"not loadable: {error}"
    return library, f"native, {INSTRUCTION_SETS[library.apack_instruction_set()]}"


LIBRARY, STATUS = load_library()
INSTRUCTION_SET = LIBRARY.apack_instruction_set() if LIBRARY is not None else 0
