"""Every test compiles anew."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Dynamo stops compiling a function after a few models, whichever tests they belong to."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
