"""What `report(model, all_ranks=True)` returns: the reports of all processes that share a model, or that have one each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed
from torch import nn

from apack_compile.checks import counted, size
from apack_compile.generate.reporting import PACKED_STATUS, Report
from apack_compile.plan.ranks import group_of

# Of a report's bytes, those that add up over ranks.
SUMMED = ("dense_bytes", "sequence_bytes", "model_bytes", "unpacked_bytes")
COLUMNS = ("rank", "tokens", "dense (16-bit)", "packed", "ratio", "bases", "weights", "layers packed")


@dataclass(frozen=True, repr=False)
class RanksReport:
    """The reports of all ranks, in their order; prints as a table with a line for each."""

    reports: tuple[Report, ...]

    @property
    def bytes(self) -> dict[str, Any] | None:
        """Bytes of the last caches of all ranks together, and their ratio; None before the first one."""
        held = [report.bytes for report in self.reports if report.bytes]
        if not held:
            return None
        sums = {name: sum(one[name] for one in held) for name in SUMMED}
        return sums | {"ratio": sums["dense_bytes"] / max(sums["sequence_bytes"], 1)}

    @property
    def notes(self) -> dict[str, tuple[int, ...]]:
        """What a reader must know, and the ranks whose reports say it."""
        found: dict[str, tuple[int, ...]] = {}
        for rank, report in enumerate(self.reports):
            for note in report.notes:
                found[note] = (*found.get(note, ()), rank)
        return found

    def to_dict(self) -> dict[str, Any]:
        """This report as plain values."""
        return {"bytes": self.bytes, "reports": [report.to_dict() for report in self.reports]}

    def __repr__(self) -> str:
        said, held = [counted(len(self.reports), "rank")], self.bytes
        if held:
            dense, packed = size(held["dense_bytes"]), size(held["sequence_bytes"])
            said.append(f"{packed} instead of {dense} ({held['ratio']:.2f}x) on all of them")
        said += [counted(len(self.notes), "note")] if self.notes else []
        return f"<apack-compile report, {', '.join(said)}; print it for all of it>"

    def __str__(self) -> str:
        rows = [COLUMNS, *map(row_of, range(len(self.reports)), self.reports)]
        if self.bytes:
            weights = sum(report.weight_bytes for report in self.reports)
            rows.append(("all", "", *bytes_of(self.bytes), f"{weights:,}", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)
        return "\n".join(("apack-compile, bytes of the last cache by rank:", *table, *said_by(self)))


def row_of(rank: int, report: Report) -> tuple[str, ...]:
    """The table's row of a rank."""
    packed = sum(line.status in PACKED_STATUS for line in report.layers)
    held = ("", *[""] * 4) if report.bytes is None else (f"{report.bytes['tokens']:,}", *bytes_of(report.bytes))
    return (str(rank), *held, f"{report.weight_bytes:,}", f"{packed} of {len(report.layers)}")


def bytes_of(held: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a table's row that have bytes of a cache."""
    dense, packed, bases = (f"{held[name]:,}" for name in ("dense_bytes", "sequence_bytes", "model_bytes"))
    return dense, packed, f"{held['ratio']:.2f}x", bases


def said_by(report: RanksReport) -> Iterator[str]:
    """Lines below the table: what each rank does, and notes with their ranks."""
    for rank, one in enumerate(report.reports):
        yield f"rank {rank}: {one.setting}; decode: {one.compile} ({one.compile_reason})"
    for note, ranks in report.notes.items():
        who = "every rank" if len(ranks) == len(report.reports) else f"rank {', '.join(map(str, ranks))}"
        yield f"note, {who}: {note}"


def gathered(model: nn.Module, report: Report) -> RanksReport:
    """The reports of all ranks, which all must ask for: of those that share the model, else of all processes of torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return RanksReport((report,))
    group = group_of(model)
    reports: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(reports, report, group)
    return RanksReport(tuple(reports))
