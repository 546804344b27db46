"""`apack::linear` is a linear layer, through oneDNN where that is faster."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from apack_compile.kernels import native
from apack_compile.kernels.linear.cpu import linear, onednn_is_faster

CPU_INFO = Path("/proc/cpuinfo")


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    with_bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_product_of_any_shape(shape, inputs, outputs, with_bias, transposed, seed):
    torch.manual_seed(seed)
    x = torch.randn(*shape, inputs)
    weight = torch.randn(inputs, outputs).T if transposed else torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if with_bias else None
    if x.dim() > 1:
        x = x.transpose(0, -2)
    out = torch.ops.apack.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    terms = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert out.shape == exact.shape and out.dtype == torch.float32
    assert bool(((out - exact).abs() <= 1e-6 * terms).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_is_left_to_pytorch(dtype):
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((3, 7), (5, 7), (5,)))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=0)


def test_the_operation_can_be_traced():
    torch.library.opcheck(torch.ops.apack.linear.default, (torch.randn(2, 3, 7), torch.randn(5, 7), torch.randn(5)))


@pytest.mark.skipif(not CPU_INFO.exists() or native.COMPILED is None, reason="nothing to compare with")
def test_it_is_faster_on_an_x86_that_is_not_intels():
    told = CPU_INFO.read_text()
    other = "vendor_id" in told and "GenuineIntel" not in told
    assert onednn_is_faster() == (other and torch.backends.mkl.is_available())
