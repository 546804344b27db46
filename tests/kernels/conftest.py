"""Where Triton's kernels run."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """What --device says."""
    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to reads as NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(2, 2).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])
