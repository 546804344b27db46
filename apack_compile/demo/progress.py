"""Progress bars of commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from apack_compile.demo.assets import INSTALL_HINT, DemoAssetsError


def new_console() -> Any:
    """Where commands print tables; raises DemoAssetsError without rich."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise DemoAssetsError(f"the package 'rich' is not installed; {INSTALL_HINT}") from error
    return Console()


@contextmanager
def progress_bars(console: Any) -> Iterator[Any]:
    """Bars with times, which vanish at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


@contextmanager
def bar_of(console: Any, what: str) -> Iterator[None]:
    """A bar for work whose end nobody knows."""
    with progress_bars(console) as progress:
        progress.add_task(what, total=None)
        yield
