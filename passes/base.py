"""What a pass is, how passes run over a graph, and the record they leave."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import fx

from apack_compile.files import naming


@dataclass(frozen=True)
class MatchRecord:
    """What a report shows of a match; `reason` is None where it was rewritten. It keeps no graph alive."""

    node: str
    layer: str | None = None
    reason: str | None = None
    packed: bool = False
    details: Mapping[str, object] = field(default_factory=dict)


class Match(Protocol):
    """What a pass found: a node to rewrite and what a report shows of it."""

    @property
    def node(self) -> fx.Node: ...

    def record(self) -> MatchRecord: ...


@dataclass(frozen=True)
class Refusal:
    """What stays as it is; `packed` says that it reads a packed cache, `covers` are further nodes whose reads the reason explains."""

    node: fx.Node
    layer: str | None
    reason: str
    packed: bool
    covers: frozenset[fx.Node] = frozenset()
    details: Mapping[str, object] = field(default_factory=dict)

    def record(self) -> MatchRecord:
        """What a report shows of the refusal."""
        return MatchRecord(self.node.name, self.layer, self.reason, self.packed, self.details)


class Pass(ABC):
    """A rewrite of a graph. Subclasses are frozen dataclasses; their fields are its configuration."""

    # A pass that only cleans up after others leaves a graph alone that they did not change.
    only_after_change: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def match(self, graph: fx.Graph) -> Sequence[Match | Refusal]:
        """What the pass would rewrite, and what it refuses with a reason. Changes nothing."""

    @abstractmethod
    def rewrite(self, graph: fx.Graph, matches: Sequence[Any]) -> int:
        """Rewrite the matches; how many were."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph."""

    name: str
    count: int
    matches: tuple[MatchRecord, ...]


@dataclass(frozen=True)
class GraphRecord:
    """What all passes did to one graph."""

    passes: tuple[PassRecord, ...]

    @property
    def sites(self) -> tuple[MatchRecord, ...]:
        """Every attention, rewritten (`reason` is None) or not, and every packed cache that something else reads."""
        return tuple(m for p in self.passes if p.name == "FuseAttend" for m in p.matches)

    @property
    def shared_heads(self) -> tuple[MatchRecord, ...]:
        """Every attention over a dense cache that no longer repeats its heads."""
        return tuple(m for p in self.passes if p.name == "ShareHeads" for m in p.matches)

    @property
    def linear_layers(self) -> tuple[MatchRecord, ...]:
        """Every linear layer that oneDNN computes."""
        return tuple(m for p in self.passes if p.name == "LinearThroughOneDnn" for m in p.matches)

    @property
    def cache_updates(self) -> tuple[MatchRecord, ...]:
        """Every update of a stock cache that an attention reads, and why it stays as it is."""
        return tuple(m for p in self.passes if p.name == "FindCacheUpdates" for m in p.matches)

    @property
    def static_buffers(self) -> tuple[MatchRecord, ...]:
        """With own_cache: every pair of static buffers that has a packed form (`reason` is None), and what is refused."""
        return tuple(m for p in self.passes if p.name == "PackBuffers" for m in p.matches)

    @property
    def left(self) -> tuple[MatchRecord, ...]:
        """Sites not rewritten although they read a packed cache: it is unpacked there at every step."""
        return tuple(m for m in self.sites if m.reason is not None and m.packed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass], dump_dir: str | Path | None = None) -> GraphRecord:
    """Run `passes` over `gm` in place; with `dump_dir`, write the graph before and after each to a new folder in it."""
    folder = None if dump_dir is None else _new_folder(Path(dump_dir))
    records: list[PassRecord] = []
    for step, current in enumerate(passes):
        if current.only_after_change and not any(r.count for r in records):
            records.append(PassRecord(current.name, 0, ()))
            continue
        _dump(gm, folder, f"{step}_{current.name}_before.txt")
        found = current.match(gm.graph)
        # Recorded before the rewrite, which erases the nodes.
        matches = tuple(m.record() for m in found)
        count = current.rewrite(gm.graph, [m for m in found if not isinstance(m, Refusal)])
        if count:
            gm.graph.lint()
            gm.recompile()
        _dump(gm, folder, f"{step}_{current.name}_after.txt")
        records.append(PassRecord(current.name, count, matches))
    record = GraphRecord(tuple(records))
    if folder is not None:
        (folder / "record.json").write_text(json.dumps(record.to_dict(), indent=1) + "\n")
    return record


def _new_folder(parent: Path) -> Path:
    """`parent/graph_000`, or the first number that is free; several processes may share `parent`."""
    with naming(f"dump_dir={str(parent)!r}", "a folder, or the name of one to make"):
        parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = parent / f"graph_{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _dump(gm: fx.GraphModule, folder: Path | None, name: str) -> None:
    if folder is not None:
        (folder / name).write_text(gm.print_readable(print_output=False) + "\n")
