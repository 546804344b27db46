"""One write of new tokens into a static buffer: what it writes, where, and through which view."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from apack_compile.passes.graph.effects import written
from apack_compile.passes.graph.nodes import arguments, kind, op_name, same_sizes, shape, value_of
from apack_compile.passes.graph.views import entries_of


@dataclass(frozen=True)
class Span:
    """Positions of a slice: every `step`-th from `start` on, up to `end` or `length` of them; None where the slice does not say."""

    start: fx.Node | int
    end: fx.Node | int | None = None
    step: fx.Node | int = 1
    length: fx.Node | int | torch.SymInt | None = None

    def has(self, count: int | torch.SymInt) -> bool:
        """Whether it is known to be of `count` positions."""
        if self.length is not None:
            return statically_known_true(value_of(self.length) == count)
        return self.end is not None and statically_known_true(value_of(self.end) - value_of(self.start) == count)


@dataclass(frozen=True)
class BufferWrite:
    """`new` enters `target` at the positions `index`; part: the slice of the target that `new` is copied into, where there is one."""

    target: fx.Node
    new: fx.Node
    index: fx.Node | Span
    part: fx.Node | None = None

    def fills(self, count: int | torch.SymInt, dim: int) -> bool:
        """Whether each position gets one of `count` new tokens, dimension `dim` of the target; fewer would be repeated."""
        if self.part is not None and same_sizes((shape(self.part) or ())[dim : dim + 1], (count,)):
            return True
        return self.index.has(count) if isinstance(self.index, Span) else same_sizes(shape(self.index) or (), (count,))


def read_write(write: fx.Node) -> BufferWrite | str:
    """What an update of a buffer writes and where, or why that is not known."""
    name = kind(write)
    if name == "index_copy":
        given = arguments(write, "self", "dim", "index", "source")
        return _checked(write, given["self"], given["source"], given["index"])
    if name in ("index_put", "setitem"):
        given = arguments(write, "self", "index", "value")
        entries, new = given.get("index", given.get("indices")), given.get("value", given.get("values"))
        if name == "index_put":
            entries = [slice(None) if entry is None else entry for entry in entries]
        return _checked(write, given["self"], new, _taken(entries, given["self"]))
    if name == "slice_scatter":
        given = arguments(write, "self", "src", "dim", "start", "end", "step")
        new, part = given["src"], None
        if kind(new) == "copy" and not written(new):
            # what functionalization makes of a copy_ into a slice
            part, new = new.args[:2]
        elif (size := shape(new)) is not None:
            given["length"] = size[given.get("dim", 0)]
        return _checked(write, given["self"], new, _span(given), part)
    if name == "copy":
        given = arguments(write, "self", "src")
        part, where = given["self"], _sliced(given["self"])
        if where is None:
            return f"{op_name(write)} replaces all of its buffer"
        return _checked(write, part, given["src"], where, part)
    return f"{op_name(write)} is no write at the positions of an index"


def _checked(write: fx.Node, target: Any, new: Any, index: Any, part: Any = None) -> BufferWrite | str:
    """A write whose positions are one tensor `[n]`, or a slice of step 1 that does not count from the end."""
    if not isinstance(new, fx.Node) or shape(new) is None:
        return f"{op_name(write)} writes what is no tensor"
    if isinstance(index, Span):
        if index.step != 1:
            return f"{op_name(write)} writes every {index.step} slots"
        if isinstance(index.start, int) and index.start < 0:
            return f"{op_name(write)} writes from slot {index.start} on, counted from the end"
    elif len(shape(index) or ()) != 1 or value_of(index).dtype not in (torch.int32, torch.int64):
        return f"{op_name(write)} does not write at the positions of one index"
    return BufferWrite(target, new, index, part)


def _sliced(view: Any) -> Span | None:
    """The slice of one dimension that a view is."""
    name = kind(view) if isinstance(view, fx.Node) else None
    if name == "slice":
        return _span(arguments(view, "self", "dim", "start", "end", "step"))
    if name == "narrow":
        return _span(arguments(view, "self", "dim", "start", "length"))
    taken = _taken(view.args[1], view.args[0]) if name == "getitem" else None
    return taken if isinstance(taken, Span) else None


def _span(given: dict[str, Any]) -> Span:
    step = given.get("step")
    return Span(given.get("start") or 0, given.get("end"), 1 if step is None else step, given.get("length"))


def _taken(index: Any, target: Any) -> fx.Node | Span | None:
    """What an index takes of the one dimension of which it takes a part; None where there are several, or none."""
    found = [entry for entry in entries_of(index, len(shape(target) or ())) or () if entry != slice(None)]
    if len(found) == 1 and isinstance(found[0], slice):
        return _span({"start": found[0].start, "end": found[0].stop, "step": found[0].step})
    return found[0] if len(found) == 1 and isinstance(found[0], fx.Node) else None
