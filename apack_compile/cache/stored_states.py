"""K and V of an eager decode step, decoded only where something else than an attention reads them.

`Cache.update` must return keys and values before it is known what reads them. `scaled_dot_product_attention` of the states that a
layer returned becomes `apack::attend`; every other function gets them decoded.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from apack_compile.models.attention_call import ATTENTION, named_arguments

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer

METADATA = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.is_floating_point,
    )
)


class StoredStep:
    """What a layer holds after one update: its new states `[B, H_kv, n, D]`, and how many tokens are offered to the model."""

    def __init__(self, layer: "CompactedLayer", key: Tensor, value: Tensor, tokens: int) -> None:
        self.layer, self.new, self.tokens = layer, (key, value), tokens
        self.update = layer.updates

    def states(self) -> tuple["StoredStates", "StoredStates"]:
        """K and V `[B, H_kv, tokens, D]`."""
        key, value = (StoredStates(self, i, (*x.shape[:2], self.tokens, x.shape[3])) for i, x in enumerate(self.new))
        return key, value

    @cached_property
    def decoded(self) -> tuple[Tensor, Tensor]:
        """K and V as tensors; raises RuntimeError when the layer was updated since."""
        self.check()
        return self.layer.unpacked(*self.new, self.tokens)

    def check(self) -> None:
        """Raise RuntimeError when the layer holds other tokens by now."""
        if self.update != self.layer.updates:
            raise RuntimeError(
                f"layer {self.layer.layer_idx}: keys or values of an earlier step are read after the cache was updated; "
                "clone them in the step that returns them"
            )


class StoredStates(Tensor):
    """K (stream 0) or V (1) of a step, each head repeated; between the two halves of a repetition, `[B, H_kv, repeats, T, D]`."""

    step: StoredStep
    stream: int
    repeats: int
    # The same as a tensor, once something has read it, and perhaps written to it.
    read: Tensor | None

    @staticmethod
    def __new__(cls, step: StoredStep, stream: int, shape: tuple[int, ...], repeats: int = 1) -> "StoredStates":
        new = step.new[stream]
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        made.step, made.stream, made.repeats, made.read = step, stream, repeats, None
        return made

    def again(self, shape: tuple[int, ...], repeats: int) -> "StoredStates":
        """The same states in another shape."""
        return StoredStates(self.step, self.stream, shape, repeats)

    @property
    def decoded(self) -> Tensor:
        """These states as a tensor, the same one each time."""
        if self.read is None:
            states = self.step.decoded[self.stream][:, :, None].expand(-1, -1, self.repeats, -1, -1)
            self.read = states if self.dim() == 5 else states.flatten(1, 2)
        return self.read

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is ATTENTION:
            out = attended(*args, **kwargs)
        else:
            out = repeated(func, args, kwargs)
        return func(*decoded(args), **decoded(kwargs)) if out is None else out

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*decoded(args), **decoded(kwargs or {}))


def decoded(tree: Any) -> Any:
    """The same arguments with stored states decoded."""
    return tree_map(lambda x: x.decoded if isinstance(x, StoredStates) else x, tree)


def repeated(func: Callable, args: tuple, kwargs: dict[str, Any]) -> StoredStates | None:
    """Stored states after a step of head repetition (`x[:, :, None].expand(...).reshape(...)`); None for another function."""
    x, given = (args or (None,))[0], args[1:]
    if not isinstance(x, StoredStates) or x.read is not None or kwargs:
        return None
    if func is Tensor.contiguous and not given:
        return x
    batch, heads, (tokens, width) = x.shape[0], x.shape[1], x.shape[-2:]
    if func is Tensor.__getitem__ and x.dim() == 4 and adds_a_dimension(given[0]):
        return x.again((batch, heads, 1, tokens, width), 1) if x.repeats == 1 else None
    sizes = tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if not all(type(size) is int for size in sizes) or x.dim() != 5:
        return None
    if func is Tensor.expand and x.repeats == 1 and len(sizes) == 5:
        wanted = tuple(have if size == -1 else size for size, have in zip(sizes, x.shape, strict=True))
        if wanted == (batch, heads, wanted[2], tokens, width):
            return x.again(wanted, wanted[2])
    whole = (batch, heads * x.repeats, tokens, width)
    if (
        func is Tensor.reshape
        and len(sizes) == 4
        and all(size in (-1, n) for size, n in zip(sizes, whole, strict=True))
    ):
        return x.again(whole, x.repeats)
    return None


def adds_a_dimension(index: Any) -> bool:
    """Whether an index is `[:, :, None]`, with or without the colons behind it."""
    every = slice(None)
    plain = isinstance(index, tuple) and all(i is None or isinstance(i, slice) for i in index)
    return plain and index in ((every, every, None), (every, every, None, every, every))


def attended(*args: Any, **kwargs: Any) -> Tensor | None:
    """Attention over stored states without decoding them; None where these arguments ask for something else."""
    named = named_arguments(args, kwargs)
    query, key, value, mask = named["query"], named["key"], named["value"], named["attn_mask"]
    if not isinstance(key, StoredStates) or not isinstance(value, StoredStates) or isinstance(query, StoredStates):
        return None
    step = key.step
    layer, (new_key, new_value) = step.layer, step.new
    fits = (
        value.step is step
        and key.read is None
        and value.read is None
        and (key.stream, value.stream, key.dim(), value.dim()) == (0, 1, 4, 4)
        and key.repeats == value.repeats
        and query.dim() == 4
        and (named["enable_gqa"] or query.shape[1] == key.shape[1])
        and query.shape[1] % new_key.shape[1] == 0
        and (query.shape[0], query.shape[3]) == (new_key.shape[0], new_key.shape[3])
    )
    tokens = new_key.shape[2]
    if not fits or named["dropout_p"] or named["is_causal"]:
        return None
    if (mask is None and tokens > 1) or (mask is not None and (mask.dim() != 4 or mask.shape[3] != step.tokens)):
        return None
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, new_key, new_value))
    if layer.tiers is None and wants_gradient:
        return None
    step.check()
    scale = float(query.shape[3] ** -0.5 if named["scale"] is None else named["scale"])
    return layer.attend(query, new_key, new_value, mask, scale)
