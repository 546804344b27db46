"""What all benchmarks share: how results are written and printed."""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
PEERS = ("hqq", "optimum-quanto", "turboquant-vllm")
WIDTH = 180


def machine() -> str:
    """The device that runs the benchmark, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions that figures depend on; peers that are not installed are left out."""
    found = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, rows: Sequence[Row], settings: Mapping[str, Any] | None = None) -> None:
    """Write rows with date, machine, versions and the settings of the run."""
    date = datetime.now(UTC).date().isoformat()
    head = {"date": date, "machine": machine(), "versions": versions(), "settings": dict(settings or {})}
    path.write_text(json.dumps({**head, "rows": list(rows)}, indent=1) + "\n")


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Rows of the same keys as a table; None is a dash."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=WIDTH).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value}"
