"""Puts this folder on the path, for its model builders; every test compiles anew."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Dynamo stops compiling a function after a few models, whichever tests they belong to."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
