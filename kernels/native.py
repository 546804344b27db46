"""The compiled operations for CPUs: where they were built, and what they need of the processor.

`pip install` builds `_native.so` where there is a C++ compiler, and goes on without it elsewhere; then the references serve
the CPU, and the report says so. The functions take addresses only: nothing in them depends on Python or on torch's ABI.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from apack_compile.kernels.format import WIDTHS
from apack_compile.kernels.structs import STRUCTURES, places

# kernels/csrc/dispatch.cpp: Set. The last one that a processor has is taken; it may lack some before it.
INSTRUCTION_SETS = ("baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_vnni_bf16", "avx512_amx")
WITHOUT_INTEGERS = ("baseline", "avx2", "avx512")
# kernels/csrc/threads.h: OpenMp
OPENMP_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


def has_integers(instructions: int) -> bool:
    """Whether attention multiplies levels as integers with that instruction set."""
    return INSTRUCTION_SETS[instructions] not in WITHOUT_INTEGERS


def sets_of(library: ctypes.CDLL) -> tuple[int, ...]:
    """The instruction sets that the processor has, best last: indices into INSTRUCTION_SETS."""
    return tuple(i for i in range(len(INSTRUCTION_SETS)) if library.apack_has_instruction_set(i))


def find_library() -> Path | None:
    """The file of the compiled operations, or None where they were not built."""
    path = Path(__file__).with_name("_native.so")
    return path if path.is_file() else None


def functions_of_pytorch(names: Sequence[str]) -> list[int | None]:
    """Addresses of what PyTorch's libraries, and those that they are linked to, export; None for what is missing."""
    pytorch = ctypes.CDLL(torch._C.__file__)
    found = [getattr(pytorch, name, None) for name in names]
    return [None if function is None else ctypes.cast(function, ctypes.c_void_p).value for function in found]


def use_openmp(library: ctypes.CDLL) -> bool:
    """Let the operations run on PyTorch's own threads; False where it has no OpenMP: then they run on the calling thread."""
    functions = functions_of_pytorch(OPENMP_FUNCTIONS)
    library.apack_use_openmp(*map(ctypes.c_void_p, functions))
    return None not in functions


def lays_out_alike(library: ctypes.CDLL) -> bool:
    """Whether a library has the structures and the bands that Python has."""
    if not all(
        hasattr(library, name)
        for name in ("apack_place", "apack_bits", "apack_has_instruction_set", "apack_is_other_x86")
    ):
        return False
    expected = {name: at for kind in STRUCTURES for name, at in places(kind).items()}
    bits = tuple(library.apack_bits(band) for band in range(len(WIDTHS) + 1))
    return bits == (*WIDTHS, 0) and all(library.apack_place(name.encode()) == at for name, at in expected.items())


def load_library(path: Path | None) -> tuple[ctypes.CDLL | None, str]:
    """The compiled operations, or None; and which they are, or why there are none."""
    if path is None:
        return None, "not built"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"not loadable: {error}"
    if not lays_out_alike(library):
        return None, "built from other sources: install again"
    threads = "" if use_openmp(library) else ", one thread: this PyTorch has no OpenMP"
    return library, f"native, {INSTRUCTION_SETS[sets_of(library)[-1]]}{threads}"


COMPILED, STATUS = load_library(find_library())
SETS = sets_of(COMPILED) if COMPILED is not None else ()
INSTRUCTION_SET = SETS[-1] if SETS else 0
