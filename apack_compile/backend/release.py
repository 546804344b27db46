"""Give back the memory of a tensor that stays where it is: same size, strides, address and views."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

MADV_DONTNEED = 4


def release(tensor: Tensor) -> int:
    """Give the memory of a tensor's storage back to the system; how many bytes were. What was in it is gone, for its views too.

    On a CPU it reads as zeros afterwards and can be written again: the system gives fresh pages. Memory that the system does not
    give so (a mapped file, shared memory, any system but Linux) is only zeroed: 0 bytes. On CUDA the storage has no size until
    `regain`, and reading it is an error there.
    """
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if tensor.device.type != "cpu":
        storage.resize_(0)
        return size
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    start = -storage.data_ptr() % mmap.PAGESIZE
    given = max((size - start) // mmap.PAGESIZE * mmap.PAGESIZE, 0)
    if not _give(storage.data_ptr() + start, given):
        start = given = 0
    raw[:start].zero_()
    raw[start + given :].zero_()
    if given and bool(raw.any()):
        raw.zero_()
        return 0
    return given


def regain(tensor: Tensor) -> None:
    """Make a released tensor usable again, all zeros; one that reads as zeros already is left alone."""
    storage, size = tensor.untyped_storage(), tensor.numel() * tensor.dtype.itemsize
    if storage.nbytes() < size:
        storage.resize_(size)
        tensor.zero_()


def _give(address: int, size: int) -> bool:
    """Whether the system took whole pages of this process's own memory."""
    if not size or sys.platform != "linux":
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise(address, size, MADV_DONTNEED) == 0
