"""`encode` on CPUs: addresses and strides for the compiled function (kernels/csrc/encode.h)."""

import torch
from torch import Tensor

from apack_compile.kernels.addresses import with_rows
from apack_compile.kernels.format import BANDS, FLOAT16_MAX, MIN_TOKEN_SCALE, Bands, StreamBasis
from apack_compile.kernels.native import COMPILED, DTYPES, INSTRUCTION_SET
from apack_compile.kernels.structs import ENCODE

# `Quantizer` of kernels/csrc/arguments.h
QUANTIZER = (*(band.unit_step for band in BANDS), MIN_TOKEN_SCALE, FLOAT16_MAX)


def serves(x: Tensor, basis: StreamBasis) -> bool:
    """Whether the compiled function can encode tokens `x` with this basis."""
    return COMPILED is not None and x.dtype in DTYPES and basis.mean.dtype in DTYPES and not x.requires_grad


def encode(x: Tensor, basis: StreamBasis, bands: Bands, token_scale: bool) -> tuple[Tensor, Tensor]:
    """As `encode`, in float32 inside. Raises MemoryError when there is no memory for scratch space."""
    x = with_rows(x)
    batch, groups, tokens, width = x.shape
    codes = x.new_empty((batch, groups, tokens, bands.token_bytes), dtype=torch.uint8)
    scale = x.new_empty((batch, groups, tokens) if token_scale and bands.components else 0, dtype=torch.float16)
    mean, decoder, step = basis.mean.contiguous(), basis.decoder.contiguous(), basis.step.float().contiguous()
    arguments = ENCODE.pack(
        torch.get_num_threads(), batch, tokens, width, x.data_ptr(), DTYPES[x.dtype], *x.stride()[:3], *QUANTIZER,
        codes.data_ptr(), DTYPES[codes.dtype], *codes.stride()[:3], groups, scale.data_ptr() if scale.numel() else 0,
        mean.data_ptr(), decoder.data_ptr(), step.data_ptr(), DTYPES[mean.dtype], mean.shape[0], *bands.counts,
    )  # fmt: skip
    if COMPILED.apack_encode(arguments, INSTRUCTION_SET):
        raise MemoryError("encode: no memory for its scratch space")
    return codes, scale
