"""What moved between two result files of the benchmarks: `python benchmarks/compare.py OLD NEW`.

Rows are the same where their labels are: text, whole numbers and true or false, of the columns that both files have. Other columns are
figures, compared as new over old. Worse by more than `--threshold` is a regression, and the exit status 1; of a figure that
is neither better high nor better low only the ratio is shown.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from harness import Row, print_table

MORE_IS_BETTER = ("speedup", "share_of_", "tokens_per_second", "largest_batch", "ratio", "accuracy", "answers_equal")
LESS_IS_BETTER = ("_ms", "_seconds", "_bytes", "compaction_share", "kl")
# Neither: what the time model says, how long the benchmark took.
NEITHER = ("limit_of_", "step_seconds")
# Whole numbers that are figures, and texts that say how a figure came about.
COUNTED = ("_bytes", "largest_batch")
REMARKS = ("dense", "bands_key", "bands_value", "limit", "note", "reason", "status", "verdict")

Labels = tuple[tuple[str, Any], ...]


class ResultFileError(ValueError):
    """A file that is not a result file of the benchmarks."""


@dataclass(frozen=True)
class Move:
    """One figure of a row that both files have."""

    labels: Labels
    figure: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        """New over old; inf where old is 0 and new is not."""
        return self.new / self.old if self.old else math.inf if self.new else 1.0

    def is_regression(self, threshold: float) -> bool:
        """Whether the figure is worse by more than this share."""
        if any(part in self.figure for part in NEITHER):
            return False
        if any(part in self.figure for part in LESS_IS_BETTER):
            return self.ratio > 1 + threshold
        return any(part in self.figure for part in MORE_IS_BETTER) and self.ratio < 1 - threshold


def read_results(path: Path) -> dict[str, Any]:
    """A result file; raises ResultFileError for anything else."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ResultFileError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ResultFileError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not {"machine", "versions", "rows"} <= found.keys():
        raise ResultFileError(f"{path}: a result file is an object with machine, versions and rows")
    rows = found["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ResultFileError(f"{path}: rows must be a list of objects")
    nested = next((name for row in rows for name, value in row.items() if isinstance(value, (dict, list))), None)
    if nested is not None:
        raise ResultFileError(f"{path}: rows must be flat, but {nested!r} holds a list or an object")
    return found


def is_figure(name: str, value: Any) -> bool:
    """Whether a column was measured."""
    return isinstance(value, float) or (type(value) is int and any(part in name for part in COUNTED))


def by_labels(rows: Sequence[Row], columns: set[str]) -> dict[Labels, Row]:
    """Rows by what they are about, of these columns; rows that are about the same are numbered."""
    seen: Counter[Labels] = Counter()
    found = {}
    for row in rows:
        labels = tuple(
            (name, value)
            for name, value in sorted(row.items())
            if name in columns and name not in REMARKS and value is not None and not is_figure(name, value)
        )
        seen[labels] += 1
        found[(*labels, ("row", seen[labels])) if seen[labels] > 1 else labels] = row
    return found


def moves(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[Move], list[Labels], list[Labels]]:
    """Figures of the rows that are in both, rows of the old file alone, rows of the new one alone."""
    shared = {name for row in old for name in row} & {name for row in new for name in row}
    before, after = by_labels(old, shared), by_labels(new, shared)
    found = [
        Move(labels, name, value, after[labels][name])
        for labels, row in before.items()
        if labels in after
        for name, value in row.items()
        if is_figure(name, value) and is_figure(name, after[labels].get(name))
    ]
    return found, [k for k in before if k not in after], [k for k in after if k not in before]


def described(labels: Labels) -> str:
    """Labels in words."""
    return ", ".join(f"{name} {value}" for name, value in labels)


def main(
    old: Annotated[Path, typer.Argument(help="Result file to compare with.")],
    new: Annotated[Path, typer.Argument(help="Result file that is compared.")],
    threshold: Annotated[float, typer.Option(help="Share by which a figure may be worse.", min=0.0)] = 0.1,
    every: Annotated[bool, typer.Option("--every", help="Show figures that moved less, too.")] = False,
) -> None:
    """Compare two result files."""
    try:
        results = [read_results(path) for path in (old, new)]
    except ResultFileError as error:
        raise typer.BadParameter(str(error)) from error
    for path, found in zip((old, new), results, strict=True):
        print(f"{path}: {found['machine']}, {found.get('date', 'no date')}, {found['versions']}")
    found_moves, gone, added = moves(results[0]["rows"], results[1]["rows"])
    rows = [
        {
            "row": described(move.labels),
            "figure": move.figure,
            "old": move.old,
            "new": move.new,
            "new / old": move.ratio,
            "": "REGRESSION" if move.is_regression(threshold) else None,
        }
        for move in found_moves
        if every or not 1 - threshold <= move.ratio <= 1 + threshold
    ]
    if rows:
        print_table(f"moved by more than {threshold:.0%}" if not every else "all figures", rows)
    regressions = sum(move.is_regression(threshold) for move in found_moves)
    print(f"{len(found_moves)} figures, {len(rows)} shown, {regressions} worse by more than {threshold:.0%}")
    for title, labels in (("only in the old file", gone), ("only in the new file", added)):
        for label in labels:
            print(f"{title}: {described(label)}")
    if not found_moves:
        print("the files have no figure in common")
    raise typer.Exit(1 if regressions else 0)


if __name__ == "__main__":
    typer.run(main)
