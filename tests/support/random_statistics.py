"""Statistics of calibrated streams, at random."""

import torch

from apack_compile.plan.basis import fit, fit_steps, moments
from apack_compile.plan.budget import StreamStatistics


def random_statistics(
    layers: int, heads: int, head_dim: int, *, groups: int = 1, vision: bool = True, seed: int = 0
) -> dict[int, dict[str, tuple[StreamStatistics, StreamStatistics]]]:
    """Statistics of streams whose spectra fall at random rates."""
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_dim // groups

    def stream() -> StreamStatistics:
        decay = float(torch.rand((), generator=generator) * 3)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        scale = torch.logspace(0, -decay, width)
        x = torch.randn(1, groups, 3 * width, width, generator=generator) * scale @ rotation + torch.randn(
            width, generator=generator
        )
        spectrum = fit_steps(fit(moments(x)), x, token_scale=True)
        variance = spectrum.deviation[0].square()
        return StreamStatistics(spectrum, variance / variance.sum())

    modalities = ("vision", "text") if vision else ("text",)
    return {layer: {modality: (stream(), stream()) for modality in modalities} for layer in range(layers)}
