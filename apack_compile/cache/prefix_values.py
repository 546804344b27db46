"""What the JSON of a prefix says of its cache, checked field by field (docs/format.md, "Prefix files")."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any


@dataclass(frozen=True)
class LayerValues:
    """A layer: its index, the position of its text slot 0, and the layout and the tensors, by name, of its state."""

    layer: int
    origin: int
    layout: list[int]
    tensors: list[str]


@dataclass(frozen=True)
class GroupValues:
    """The layers of one window. prefix: tokens that all rows share; bases: the digest of the plan's; others as in `SharedIndex`."""

    window: int | None
    bases: str
    prefix: int | None
    assigned: int
    capacity: int
    laid_out: list[int]
    floor: int
    coordinates: dict[str, str]
    layers: list[LayerValues]


def field_of(values: Any, name: str, *kinds: type) -> Any:
    """A field of an object; raises ValueError where it is missing, or of none of these types."""
    if not isinstance(values, Mapping) or name not in values:
        raise ValueError(f"not laid out as a prefix: {name} is missing")
    # a bool is no integer here
    if type(values[name]) not in kinds:
        wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"not laid out as a prefix: {name} is {values[name]!r:.80}, not of type {wanted}")
    return values[name]


def list_of(values: Any, name: str, kind: type) -> list[Any]:
    """A field that is a list of one type; raises ValueError."""
    found = field_of(values, name, list)
    for item in found:
        field_of({name: item}, name, kind)
    return found


def groups_of(values: Any) -> list[GroupValues]:
    """The groups of a prefix; raises ValueError for what is not laid out as one."""
    return [_group_of(group) for group in list_of(values, "groups", dict)]


def _group_of(group: Mapping[str, Any]) -> GroupValues:
    coordinates = field_of(group, "coordinates", dict)
    if coordinates.keys() not in (set(), {"known", "shift"}) or not all(
        isinstance(x, str) for x in coordinates.values()
    ):
        raise ValueError("not laid out as a prefix: coordinates must name known and shift, or nothing")
    laid_out = list_of(group, "laid_out", int)
    if len(laid_out) != 2:
        raise ValueError(f"not laid out as a prefix: laid_out {laid_out} must be two integers")
    layers = [
        LayerValues(
            field_of(layer, "layer", int),
            field_of(layer, "origin", int),
            list_of(layer, "layout", int),
            list_of(layer, "tensors", str),
        )
        for layer in list_of(group, "layers", dict)
    ]
    return GroupValues(
        field_of(group, "window", int, NoneType),
        field_of(group, "bases", str),
        field_of(group, "prefix", int, NoneType),
        field_of(group, "assigned", int),
        field_of(group, "capacity", int),
        laid_out,
        field_of(group, "floor", int),
        coordinates,
        layers,
    )
