"""Settings shared by all tests."""

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings

from apack_compile.plan.basis import fit, fit_steps, moments
from apack_compile.plan.plan import StreamStatistics

# The first example of a test pays for compilation and lazy imports, so time limits per example would only be noise.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where Triton's kernels run: compiled on a GPU, or in Triton's interpreter on CPU tensors; how many model types run."""
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the kernels are tested")
    parser.addoption("--every-model", action="store_true", help="run every model type, not a sample")
    parser.addoption("--results", help="a folder for the outcome of each model type")


def pytest_configure(config: pytest.Config) -> None:
    """Triton reads this when it is imported, and decides for all kernels of the process."""
    if config.getoption("device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


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


@pytest.fixture(scope="session")
def statistics_of() -> Callable[..., dict]:
    """`random_statistics`."""
    return random_statistics
