"""What all benchmarks share: how results are written and printed."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def machine() -> str:
    """The device that runs the benchmark, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions that figures depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with machine and versions."""
    path.write_text(json.dumps({"machine": machine(), "versions": versions(), "rows": list(rows)}, indent=1) + "\n")


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Rows of the same keys as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else f"{value}" for value in row.values()))
    Console(width=140).print(table)
