"""What the layers of a chunk find in its states: left on the device, and read where nothing waits for the newest layer."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apack_compile.cache.drift import WatchedPair, judge
from apack_compile.cache.host_copy import HostCopy
from apack_compile.kernels.format import FLOAT16_MAX
from apack_compile.plan.plan import STREAMS

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer

# Layers whose exact tokens are kept until it is known whether their bases fit: a device that is so far behind has work while the host
# waits for it, and memory stays that of two layers.
LAYERS_BEHIND = 2


# Numbers of K and V that are looked at: the least and the largest of each.
ENDS = 4


def ends_of(key: Tensor, value: Tensor) -> Tensor:
    """The least and the largest number `[4]` of K, and of V; NaN where there is one."""
    # a norm of 16-bit numbers would make a copy in 32 bits on a CPU
    return torch.stack([end for x in (key, value) for end in torch.aminmax(x.detach() if x.requires_grad else x)])


@dataclass(frozen=True)
class LayerCheck:
    """What a layer found: the ends of its states, and what coding them with shared bases loses.

    wide: whether K, and V, have more than 16 bits. copy: of the numbers, where tokens are kept until they are known.
    """

    layer: "CompactedLayer"
    ends: Tensor
    wide: tuple[bool, bool]
    watched: Sequence[WatchedPair] = ()
    copy: HostCopy | None = None

    @property
    def numbers(self) -> Tensor:
        """All of them, in order."""
        return torch.cat([self.ends, *(pair.lost for pair in self.watched)]) if self.watched else self.ends

    def check(self, numbers: Sequence[float]) -> None:
        """Raise ValueError for states that cannot be packed."""
        plan, about = self.layer.index.plan, f"layer {self.layer.layer_idx}:"
        for name, least, most, is_wide in zip(STREAMS, numbers[:ENDS:2], numbers[1:ENDS:2], self.wide, strict=True):
            largest = max(-least, most)
            if not math.isfinite(largest):
                raise ValueError(f"{about} {name} states hold NaN or Inf; the cache was left as it was")
            if is_wide and largest > FLOAT16_MAX and plan is not None and not self.layer.is_lossless():
                raise ValueError(
                    f"{about} {name} states reach {largest:.3g}, past float16's {FLOAT16_MAX:.0f}; "
                    'use preset="lossless", or run the model in bfloat16'
                )

    def take(self, numbers: Sequence[float]) -> None:
        """Judge the layer by its numbers; raises ValueError for states that cannot be packed."""
        self.check(numbers)
        for i, pair in enumerate(self.watched):
            judge(self.layer, pair, numbers[ENDS + 2 * i : ENDS + 2 + 2 * i])


class Checks:
    """The checks of a chunk, oldest layer first."""

    def __init__(self) -> None:
        self._open: deque[LayerCheck] = deque()

    def add(self, layer: "CompactedLayer", key: Tensor, value: Tensor) -> None:
        """Look at the states `[B, H_kv, n, D]` of a layer."""
        if key.numel() and value.numel():
            wide = (key.dtype.itemsize > 2, value.dtype.itemsize > 2)
            self._open.append(LayerCheck(layer, ends_of(key, value), wide))

    def watch(self, watched: Sequence[WatchedPair]) -> None:
        """What the newest layer's pairs lose; reads what earlier layers found, where tokens are kept for it."""
        if not watched:
            return
        newest = self._open.pop()
        newest = LayerCheck(newest.layer, newest.ends, newest.wide, watched)
        copy = HostCopy(newest.numbers) if any(pair.tokens is not None for pair in watched) else None
        self._open.append(LayerCheck(newest.layer, newest.ends, newest.wide, watched, copy))
        while len(self._open) > LAYERS_BEHIND and (copy := self._open[0].copy) is not None:
            oldest, later = self._open.popleft(), self._open
            # where it fails, nothing that later layers found is told instead
            self._open = deque()
            oldest.take(copy.read())
            self._open = later

    def read(self) -> None:
        """Read all that is not read yet, at once; raises ValueError for the first layer whose states cannot be packed."""
        checks, self._open = list(self._open), deque()
        if not checks:
            return
        parts = [check.numbers for check in checks]
        numbers = torch.cat(parts).tolist()
        for check, part in zip(checks, parts, strict=True):
            check.take(numbers[: len(part)])
            numbers = numbers[len(part) :]

    def blame(self) -> None:
        """After another error: raise ValueError for the first layer whose states cannot be packed, which may be what failed."""
        checks, self._open = list(self._open), deque()
        for check in checks:
            check.check(check.ends.tolist())
