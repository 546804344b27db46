"""How much memory a device has in all."""

import os
from pathlib import Path

import torch

# Where Linux says what a container may use.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU, or of the machine, at most what a container may use; None where nothing says it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):
        return None
    return min(known + [limit for path in CONTAINER_LIMITS if (limit := _limit(path)) is not None])


def _limit(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # no such file, or "max"
        return None
