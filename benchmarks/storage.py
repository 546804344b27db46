"""Bytes that a cache holds, counted over its tensors; needs torch alone, as replay.py does."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Held:
    """Bytes of one sequence's cache.

    sequence_bytes: codes, scales, zero points, dense tokens, per-sequence bases. model_bytes: what all requests share.
    dense_bytes: the same tokens in 16 bits. decoded_bytes: decoded copies that the cache keeps besides its codes, not
    counted in `ratio`.
    """

    sequence_bytes: int
    dense_bytes: int
    model_bytes: int = 0
    decoded_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes held for the sequence."""
        return self.dense_bytes / self.sequence_bytes


class HalfStates:
    """A cache given float16 states, as in a 16-bit model, inside a float32 model."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Store `[B, H_kv, n, D]` in 16 bits; K and V of every token in the dtype they came in."""
        out = self.inner.update(key.half(), value.half(), *args, **kwargs)
        return tuple(states.to(key.dtype) for states in out)

    def __getattr__(self, name: str) -> Any:
        # copy.deepcopy asks for attributes before `inner` is there
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)


def tensors_of(value: Any, opens: bool = True, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Tensors reachable from an object through attributes and containers; wrapper subclasses as their parts, if `opens`."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor) and opens and is_traceable_wrapper_subclass(value):
        children = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        yield value
        return
    elif isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
        # only objects with attributes can form cycles, and they outlive the walk, so their ids stay theirs
        seen.add(id(value))
        children = list(vars(value).values())
    else:
        return
    for child in children:
        yield from tensors_of(child, opens, seen)


def fork(cache: Any) -> Any:
    """A copy that can be written to; quantized tensors, which are replaced and never written to, are shared."""
    shared = {id(t): t for t in tensors_of(cache, opens=False) if is_traceable_wrapper_subclass(t)}
    return copy.deepcopy(cache, shared)


def bytes_of(value: Any) -> int:
    """Bytes of the distinct storages reachable from an object."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(value)}
    return sum(storages.values())
