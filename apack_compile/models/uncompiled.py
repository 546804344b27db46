"""Forward passes that nothing may compile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dynamo's stance belongs to the process: two threads that set it at once would put back each other's, for good.
_STANCE_IS_OURS = threading.Lock()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what is compiled eagerly, in every thread, until the end; one thread at a time."""
    with _STANCE_IS_OURS, torch.compiler.set_stance("force_eager"):
        yield


def is_uncompiled() -> bool:
    """Whether a thread runs everything eagerly now."""
    return _STANCE_IS_OURS.locked()
