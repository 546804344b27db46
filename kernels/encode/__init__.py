"""Tokens to the codes of kernels/format.py, by what serves their device."""

import torch
from torch import Tensor

from apack_compile.kernels.encode import cpu
from apack_compile.kernels.format import Bands, StreamBasis, project, quantize


def encode(x: Tensor, basis: StreamBasis, bands: Bands, token_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Codes `[B, G, N, bytes]` (uint8) and token scales `[B, G, N]` (float16, or empty) of tokens `[B, G, N, W_g]`.

    With the identity basis the tokens themselves are returned.
    """
    if basis.mean.numel() == 0:
        return x, x.new_empty(0, dtype=torch.float16)
    if x.shape[2] == 0:
        scales = (*x.shape[:2], 0) if token_scale and bands.components else 0
        codes = x.new_empty((*x.shape[:3], bands.token_bytes), dtype=torch.uint8)
        return codes, x.new_empty(scales, dtype=torch.float16)
    if x.device.type == "cpu" and cpu.serves(x, basis):
        return cpu.encode(x, basis, bands, token_scale)
    coefficients = project(x, basis)
    if coefficients.is_cuda and coefficients.dtype == torch.float32:
        from apack_compile.kernels.encode.triton import quantize as quantize_on_cuda

        return quantize_on_cuda(coefficients, basis.step, bands, token_scale)
    return quantize(coefficients, basis.step, bands, token_scale)
