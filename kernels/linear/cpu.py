"""`apack::linear` on CPUs: PyTorch's own product through oneDNN, where the one it would take is slower.

PyTorch multiplies float32 through MKL, which chooses its code by the maker of the processor: for others than Intel it is code of an older
kind (benchmarks/linear.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.kernels.native import COMPILED

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., in]` times `weight` `[out, in]`, plus `bias` `[out]`; float32."""
    if x.numel() == 0 or {x.dtype, weight.dtype} != {torch.float32}:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", (), "")


def onednn_is_faster() -> bool:
    """Whether this PyTorch multiplies through MKL, has oneDNN as well, and the processor is an x86 that is not Intel's."""
    return (
        HAS_ONEDNN and torch.backends.mkl.is_available() and COMPILED is not None and COMPILED.apack_is_other_x86() == 1
    )
