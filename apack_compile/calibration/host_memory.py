"""Freed host memory, back to the system."""

import ctypes
import sys
from functools import cache


def give_back() -> None:
    """Return memory that was freed between pieces still in use; where the C library is not glibc, nothing.

    glibc keeps it: after a few observations a process would hold twice the memory that its tensors take.
    """
    trim = trimming_call()
    if trim is not None:
        trim(0)


@cache
def trimming_call() -> "ctypes._FuncPointer | None":
    """glibc's `malloc_trim`, if there is one."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
