"""Whether the compiled operations are there, and what is said about it."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apack_compile.kernels import native, ops, structs
from apack_compile.kernels.encode import cpu as encode_cpu
from apack_compile.kernels.format import Bands, StreamBasis

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


@pytest.mark.parametrize("kind", structs.STRUCTURES, ids=lambda kind: kind.__name__)
def test_every_field_is_where_the_library_has_it(kind):
    if native.COMPILED is None:
        pytest.skip(native.STATUS)
    offsets = {name: getattr(kind, name).offset for name, *_ in kind._fields_}
    assert {name: native.COMPILED.apack_place(f"{kind.__name__}.{name}".encode()) for name in offsets} == offsets
    assert native.COMPILED.apack_place(kind.__name__.encode()) == ctypes.sizeof(kind) == structs.packer(kind).size
    assert native.COMPILED.apack_place(f"{kind.__name__}.no_such_field".encode()) == -1


def numbers(value) -> list:
    """The numbers in a structure or an array, in order."""
    if isinstance(value, ctypes.Structure):
        return [x for name, *_ in value._fields_ for x in numbers(getattr(value, name))]
    return [x for y in value for x in numbers(y)] if isinstance(value, ctypes.Array) else [value]


@pytest.mark.parametrize("kind", structs.STRUCTURES, ids=lambda kind: kind.__name__)
def test_a_field_is_packed_where_it_is(kind):
    packer = structs.packer(kind)
    values = list(range(1, 1 + packer.size // 8))
    assert numbers(kind.from_buffer_copy(packer.pack(*values))) == values


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch):
    path = native.find_library()
    if path is None:
        pytest.skip(native.STATUS)

    class Rotations(ctypes.Structure):
        _fields_ = [structs.Rotations._fields_[i] for i in (0, 2, 1, 3)]

    monkeypatch.setattr(native, "STRUCTURES", (Rotations,))
    assert native.load_library(path) == (None, "built from other sources: install again")


def test_a_library_with_other_bands_is_refused(monkeypatch: pytest.MonkeyPatch):
    path = native.find_library()
    if path is None:
        pytest.skip(native.STATUS)
    monkeypatch.setattr(native, "WIDTHS", (16, 4, 8, 2))
    assert native.load_library(path) == (None, "built from other sources: install again")


def test_the_instruction_sets_are_those_that_the_processor_has():
    if native.COMPILED is None or not Path("/proc/cpuinfo").is_file():
        pytest.skip(f"{native.STATUS}; /proc/cpuinfo is needed")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f"}
    vnni = avx512 | {"avx512bw", "avx512_vnni", "avx512vbmi"}
    needs = {
        "baseline": set(),
        "avx2": avx2,
        "avx2_vnni": avx2 | {"avx_vnni"},
        "avx512": avx512,
        "avx512_vnni": vnni,
        "avx512_vnni_bf16": vnni | {"avx512_bf16"},
        "avx512_amx": vnni | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    }
    names = [native.INSTRUCTION_SETS[i] for i in native.SETS]
    expected = [name for name, flags in needs.items() if flags <= has]
    # a system may refuse a process the matrix registers of its processor
    assert names in (expected, [name for name in expected if name != "avx512_amx"])
    assert native.INSTRUCTION_SETS[native.INSTRUCTION_SET] == names[-1]
    assert [name for name, i in zip(names, native.SETS, strict=True) if native.has_integers(i)] == [
        name for name in names if name in ("avx2_vnni", "avx512_vnni", "avx512_vnni_bf16", "avx512_amx")
    ]


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
