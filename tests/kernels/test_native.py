"""Whether the compiled operations are there, and what is said about it."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch

from apack_compile.kernels import native, ops

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
