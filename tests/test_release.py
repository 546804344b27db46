"""Memory goes back to the system while the tensor stays what it was."""

import sys

import pytest
import torch

from apack_compile.backend.release import regain, release

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the memory; it is zeroed there")
def test_a_large_tensor_gives_its_pages_back_and_takes_new_ones_when_it_is_written():
    x = torch.randn(64, MIB // 4)
    view, address, strides, before = x[3:5], x.data_ptr(), x.stride(), resident()
    given = release(x)
    assert 63 * MIB < given <= 64 * MIB
    assert before - resident() > 60 * MIB
    assert not x.any() and not view.any()
    assert (x.data_ptr(), x.stride(), x.shape) == (address, strides, (64, MIB // 4))
    view[0, 7] = 2.0
    assert float(x.sum()) == 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the memory; it is zeroed there")
@pytest.mark.parametrize("size", [1, 1023, 1024, 5000, 500_000])
def test_no_size_leaves_numbers_behind(size):
    around = torch.ones(size + 20_000)
    x = around[:size].clone()
    given = release(x)
    assert given % 4096 == 0 and given <= x.nbytes
    assert given > x.nbytes - 2 * 4096, "all but what lies in pages that others share"
    assert not x.any() and around.all()


def test_a_mapped_file_is_only_zeroed(tmp_path):
    path = tmp_path / "tensor"
    path.write_bytes(torch.ones(MIB).numpy().tobytes())
    x = torch.from_file(str(path), shared=False, size=MIB)
    assert x.all()
    assert release(x) == 0
    assert not x.any()


def test_regain_leaves_what_was_written_since():
    x = torch.ones(3 * MIB)
    release(x)
    x[5] = 1.0
    regain(x)
    assert float(x.sum()) == 1.0
