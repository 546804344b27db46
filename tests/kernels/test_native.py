"""Whether the compiled operations are there, and what is said about it."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apack_compile.codec import Bands, StreamBasis
from apack_compile.kernels import native, ops
from apack_compile.kernels.encode import cpu as encode_cpu

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def test_the_operations_are_compiled_where_there_is_a_compiler():
    if not HAS_COMPILER and not os.environ.get("CI"):
        pytest.skip("no C++ compiler")
    assert native.COMPILED is not None, native.STATUS


@pytest.mark.parametrize("operation", ("append", "unpack", "attend", "attend_tiers"))
def test_the_cpu_has_a_kernel_of_its_own_only_where_the_operations_were_compiled(operation):
    own = torch._C._dispatch_has_kernel_for_dispatch_key(f"apack::{operation}", "CPU")
    assert own == (native.COMPILED is not None)


def test_a_missing_or_broken_library_is_said_to_be_so(tmp_path: Path):
    assert native.load_library(None) == (None, "not built")
    broken = tmp_path / "library.so"
    broken.write_bytes(b"no library")
    library, why = native.load_library(broken)
    assert library is None and why.startswith("not loadable: ")


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch):
    path = native.find_library()
    if path is None:
        pytest.skip(native.STATUS)
    monkeypatch.setitem(native.SIZES, "append", native.SEGMENT.size)
    assert native.load_library(path) == (None, "built from other sources: install again")


BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
PARALLEL = ctypes.CFUNCTYPE(None, BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
THREAD_NUMBER = ctypes.CFUNCTYPE(ctypes.c_int)


@pytest.fixture
def three_threads() -> Iterator[None]:
    if native.COMPILED is None:
        pytest.skip(native.STATUS)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    native.use_openmp(native.COMPILED)


def encoded() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 65, 48, generator=generator)
    rows = torch.linalg.qr(torch.randn(1, 1, 48, 48, generator=generator)).Q.contiguous()
    basis = StreamBasis(torch.zeros(1, 1, 48), rows, torch.full((1, 1, 48), 0.03))
    return encode_cpu.encode(x, basis, Bands((0, 48, 0, 0)), True)


def test_operations_run_on_the_threads_of_pytorch(three_threads):
    wanted, asked = encoded(), []

    def parallel(body, data, threads, flags):
        asked.append(threads)
        body(data)

    functions = PARALLEL(parallel), THREAD_NUMBER(lambda: 0)
    native.COMPILED.apack_use_openmp(*functions)
    found = encoded()
    assert asked == [3]
    assert all(map(torch.equal, found, wanted))


def test_without_openmp_operations_run_on_the_calling_thread(three_threads, monkeypatch: pytest.MonkeyPatch):
    wanted = encoded()
    monkeypatch.setattr(native, "OPENMP_FUNCTIONS", ("GOMP_parallel", "no_such_function"))
    _, status = native.load_library(native.find_library())
    assert status.endswith("one thread: this PyTorch has no OpenMP")
    assert all(map(torch.equal, encoded(), wanted))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux alone")
def test_operations_start_no_threads_of_their_own(three_threads):
    torch.randn(2_000_000).exp()
    before = len(os.listdir("/proc/self/task"))
    encoded()
    assert len(os.listdir("/proc/self/task")) == before


def test_what_serves_an_operation_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "COMPILED", ctypes.CDLL(None))
    monkeypatch.setattr(native, "STATUS", "native, avx2")
    serves = ops.implementations("cpu", torch.bfloat16)
    assert serves == dict.fromkeys(("encode", "append", "unpack", "attend"), "cpu (native, avx2)")
    assert set(ops.implementations("cpu", torch.float64).values()) == {"reference (float64)"}
    assert ops.implementations("cuda", torch.bfloat16) == {
        "encode": "cuda (Triton)",
        "append": "cuda (Triton)",
        "unpack": "reference",
        "attend": "cuda (Triton)",
    }
    assert set(ops.implementations("mps", torch.bfloat16).values()) == {"reference"}
    monkeypatch.setattr(native, "COMPILED", None)
    monkeypatch.setattr(native, "STATUS", "not built")
    assert set(ops.implementations("cpu", torch.float32).values()) == {"reference (native: not built)"}
