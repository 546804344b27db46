"""Operations that a prompt takes in each layer on CUDA, and where the host waits for the device."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What reads numbers of a device, or makes a shape of them. `torch.tensor` copies to a device, and waits for that.
WAITS = ("_local_scalar_dense", "nonzero", "equal", "tolist", "tensor", "numpy")


@dataclass
class Counts:
    """Operations by name, and the places in the package that make the host wait."""

    operations: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    places: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Operations."""
        return self.operations.total()


def has_arrived() -> bool:
    """Whether what is read has been copied to the host before: what `HostCopy` waits for is two layers old."""
    return any(frame.name == "read" and frame.filename.endswith("host_copy.py") for frame in traceback.extract_stack())


def place() -> str:
    """The line of the package that runs."""
    frames = [f for f in traceback.extract_stack() if "/apack_compile/" in f.filename or "/kernels/" in f.filename]
    return " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames[::-1][:3])


class Launch:
    """A kernel of Triton that does nothing but count."""

    def __init__(self, launches: list[str], name: str) -> None:
        self.launches, self.name = launches, name

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append(self.name)


@contextmanager
def launches() -> Iterator[list[str]]:
    """What is launched inside, by name, of the kernels that pack a prompt; none of them runs."""
    from apack_compile.kernels.append import triton as append_triton
    from apack_compile.kernels.pack import triton as pack_triton

    found: list[str] = []
    kernels = ((append_triton, "project"), (append_triton, "write"), (pack_triton, "lost"), (pack_triton, "share"))
    with ExitStack() as stack:
        for module, name in kernels:
            stack.enter_context(patch.object(module, f"{name}_kernel", Launch(found, name)))
        stack.enter_context(patch.object(torch.cuda, "device_of", lambda x: nullcontext()))
        yield found


def packing_on_cuda(arguments: tuple) -> "Counts":
    """What `apack::pack` calls and launches on CUDA."""
    from apack_compile.kernels.pack import triton as pack_triton

    counts = Counts()
    with launches() as found, _Dispatched(counts):
        pack_triton.pack(*arguments)
    counts.operations.update(f"launch of {name}" for name in found)
    return counts


class _Dispatched(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "pack":
            self.counts.operations.update(packing_on_cuda(args).operations)
            self.counts.places[place(), "pack on CUDA"] += packing_on_cuda(args).total
            return func(*args, **(kwargs or {}))
        self.counts.operations[name] += 1
        self.counts.places[place(), name] += 1
        if name in WAITS:
            self.counts.waits[name, place()] += 1
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Sees what reads host memory without an operation, which on a device would be a copy to the host."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "tensor") and not has_arrived():
            self.counts.waits[name, place()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counts]:
    """What is called inside."""
    counts = Counts()
    with _Called(counts), _Dispatched(counts):
        yield counts
