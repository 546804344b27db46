"""The demo's PNG: pictures with their answers; bytes, requests and tokens a second as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apack_compile.demo.assets import INSTALL_HINT, DemoAssetsError
from apack_compile.demo.evaluate import Results, Row

INK, MUTED, GRID = "#1f2430", "#7a8190", "#e3e6ec"
DENSE, PACKED, MODEL = "#9aa5b8", "#2f6fde", "#c9d8f6"
RIGHT, WRONG = "#1d8a4b", "#c8372d"
COLUMNS, ROWS = 6, 2
MIB = 2**20


@dataclass(frozen=True)
class Panel:
    """Bars by name, and how their values are shown."""

    title: str
    values: dict[str, float]
    shown: str


def chosen_rows(rows: Sequence[Row], count: int = COLUMNS * ROWS) -> list[Row]:
    """Rows to draw: questions that the two caches answered differently first, then the others in order."""
    return sorted(rows, key=lambda row: row.dense == row.packed)[:count]


def check_matplotlib() -> None:
    """Raises DemoAssetsError where pictures cannot be drawn: known before the demo runs for minutes."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DemoAssetsError(f"the package 'matplotlib' is not installed; {INSTALL_HINT}") from error


def draw(path: Path, title: str, results: Results, summary: dict[str, Any]) -> None:
    """Writes the picture; raises DemoAssetsError without matplotlib."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.04, 0.958, "Same pictures, same questions, a smaller KV cache", size=19, weight="bold", color=INK)
    line = (
        f"{title}, {summary['tokens_per_prompt']:.0f} tokens  ·  {summary['ratio']:.2f}x smaller  ·  "
        f"{summary['answers_equal']:.1%} of {summary['questions']} answers as from the dense cache  ·  "
        f"right: {summary['accuracy_dense']:.1%} dense, {summary['accuracy_packed']:.1%} packed"
    )
    figure.text(0.04, 0.931, line, size=10.5, color=MUTED)
    upper = figure.add_gridspec(
        ROWS, COLUMNS, left=0.04, right=0.975, top=0.855, bottom=0.415, wspace=0.12, hspace=0.72
    )
    _draw_pictures(figure, upper, results.rows)
    for place, panel in zip((0.125, 0.455, 0.77), panels_of(summary), strict=False):
        _draw_bars(figure.add_axes((place, 0.06, 0.19, 0.215)), panel)
    figure.savefig(path)


def _draw_pictures(figure: Any, grid: Any, rows: Sequence[Row]) -> None:
    from PIL import Image

    for index, row in enumerate(chosen_rows(rows)):
        axes = figure.add_subplot(grid[index // COLUMNS, index % COLUMNS])
        with Image.open(row.question.image) as image:
            axes.imshow(image.convert("RGB"))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color(GRID)
        axes.set_title(_wrapped(row.shown), size=8.5, color=INK, pad=5)
        for offset, name, text in ((-0.10, "dense", row.dense), (-0.23, "packed", row.packed)):
            right = text == row.question.answer
            axes.text(0.47, offset, name, size=9, color=MUTED, ha="right", va="center", transform=axes.transAxes)
            axes.text(
                0.53,
                offset,
                _short(text),
                size=9,
                weight="bold",
                color=RIGHT if right else WRONG,
                va="center",
                transform=axes.transAxes,
            )


def panels_of(summary: dict[str, Any]) -> list[Panel]:
    """What is drawn below the pictures: of an album where there is one, else of a prompt."""
    if "album_pictures" not in summary:
        values = {"dense, 16-bit": "dense_bytes", "packed": "sequence_bytes", "bases, once\nper model": "model_bytes"}
        bytes_of = {name: summary[key] / MIB for name, key in values.items()}
        return [Panel("KV cache of one prompt", bytes_of, "{:.2f} MiB")]
    pictures, branches = summary["album_pictures"], summary["branches"]
    held = {
        "dense, 16-bit": summary["dense_bytes_of_branches"] / MIB,
        "packed": summary["copied_bytes_of_branches"] / MIB,
        "packed, album\nonce for all": summary["shared_bytes_of_branches"] / MIB,
        "bases, once\nper model": summary["model_bytes"] / MIB,
    }
    fitting = {"dense": summary["dense_requests_in_gib"], "packed": summary["packed_requests_in_gib"]}
    speed = {"dense": summary["dense_tokens_per_second"], "packed": summary["packed_tokens_per_second"]}
    return [
        Panel(f"{branches} questions about {pictures} pictures", held, "{:.1f} MiB"),
        Panel("Such albums in 1 GiB", fitting, "{:.0f}"),
        Panel("Tokens a second, equal bytes", speed, "{:.0f}"),
    ]


def _draw_bars(axes: Any, panel: Panel) -> None:
    names, values = list(panel.values), list(panel.values.values())
    colors = [MODEL if name.startswith("bases") else DENSE if name.startswith("dense") else PACKED for name in names]
    bars = axes.barh(names, values, color=colors, height=0.62)
    axes.bar_label(bars, [panel.shown.format(value) for value in values], padding=5, size=10, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.4)
    axes.set_title(panel.title, size=12, color=INK, loc="left", pad=8)
    axes.tick_params(axis="y", length=0, labelsize=10, labelcolor=INK)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(text: str, width: int = 16) -> str:
    """An answer that does not reach into the next picture."""
    return (text if len(text) <= width else text[: width - 1] + "…") or "(nothing)"


def _wrapped(text: str, width: int = 24) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])
