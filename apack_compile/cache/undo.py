"""What it takes to undo a chunk that does not end."""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from apack_compile.cache.kept_layers import CROSS_ATTENTION
from apack_compile.cache.layer import CompactedLayer

if TYPE_CHECKING:
    from apack_compile.cache.cache import CompactedCache


@dataclass(frozen=True)
class Undo:
    """Attributes of some objects, and what was in some tensors, before a chunk.

    A layout makes new tensors, so attributes are enough; `append` writes in place.
    """

    attributes: Sequence[tuple[Any, dict[str, Any]]]
    contents: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, holders: Iterable[Any], written: Iterable[Tensor], *others: tuple[Any, dict[str, Any]]) -> "Undo":
        """What these objects and tensors are now, and some attributes of others."""
        attributes = [(holder, attributes_of(holder)) for holder in holders]
        return cls([*attributes, *others], [(x, x.clone()) for x in written])

    def apply(self) -> None:
        """Make them so again."""
        for holder, before in self.attributes:
            vars(holder).update(before)
        for tensor, before in self.contents:
            tensor.copy_(before)


def undo_of(cache: "CompactedCache", appends: bool) -> Undo:
    """What it takes to undo the coming chunk of a cache; appends: it is appended, not laid out."""
    tiers = [tiers for layer in cache.layers if (tiers := getattr(layer, "tiers", None)) is not None]
    indices = [group.index for group in cache.groups]
    packed = cache.packed_layers if appends else []
    written = [x for layer in packed for x in (layer.tail.key, layer.tail.value, layer.cursor)]
    return Undo.of((*cache.layers, *tiers, *cache.groups, *indices, cache.groups), written)


def attributes_of(holder: object) -> dict[str, Any]:
    """Attributes of an object, its lists and dictionaries copied."""
    return {name: copy(value) if isinstance(value, (list, dict)) else value for name, value in vars(holder).items()}


def lengths_of(cache: "CompactedCache") -> set[int]:
    """How many tokens the layers hold that grow with them: one number, unless a chunk did not end."""
    growing = [
        layer
        for layer, kind in zip(cache.layers, cache.kinds, strict=True)
        if isinstance(layer, (CompactedLayer, DynamicLayer)) and kind.layer_type != CROSS_ATTENTION
    ]
    return {int(layer.get_seq_length()) if layer.is_initialized else 0 for layer in growing}
