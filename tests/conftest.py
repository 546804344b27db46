"""Settings shared by all tests."""

import os
import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

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
        if os.environ.get("TRITON_INTERPRET") != "1" and "triton.language" in sys.modules:
            raise pytest.UsageError(
                "a conftest imports Triton, before it is known where kernels run: let a fixture do so"
            )
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def statistics_of() -> Callable[..., dict]:
    """`random_statistics`, imported once it is known where Triton's kernels run."""
    from random_statistics import random_statistics

    return random_statistics
