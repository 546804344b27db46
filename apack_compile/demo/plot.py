"""The demo's PNG: pictures with their answers, bytes as bars, KL by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apack_compile.demo.assets import INSTALL_HINT, DemoAssetsError
from apack_compile.demo.evaluate import Results, Row

INK, MUTED, GRID = "#1f2430", "#7a8190", "#e3e6ec"
DENSE, PACKED, MODEL = "#9aa5b8", "#2f6fde", "#c9d8f6"
RIGHT, WRONG = "#1d8a4b", "#c8372d"
COLUMNS, ROWS = 6, 2
KL_FLOOR = 1e-6


def chosen_rows(rows: Sequence[Row], count: int = COLUMNS * ROWS) -> list[Row]:
    """Rows to draw: questions that the two caches answered differently first, then the others in order."""
    return sorted(rows, key=lambda row: row.dense == row.packed)[:count]


def check_matplotlib() -> None:
    """Raises DemoAssetsError where pictures cannot be drawn: known before the demo runs for minutes."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DemoAssetsError(f"the package 'matplotlib' is not installed; {INSTALL_HINT}") from error


def draw(path: Path, title: str, results: Results, summary: dict[str, Any], kls: Sequence[float]) -> None:
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
    _draw_bytes(figure.add_axes((0.125, 0.07, 0.33, 0.235)), summary)
    if kls:
        _draw_kl(figure.add_axes((0.54, 0.085, 0.435, 0.22)), kls)
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


def _draw_bytes(axes: Any, summary: dict[str, Any]) -> None:
    names = ["dense, 16-bit", "packed", "bases, once\nper model"]
    values = [summary[name] / 2**20 for name in ("dense_bytes", "sequence_bytes", "model_bytes")]
    bars = axes.barh(names, values, color=[DENSE, PACKED, MODEL], height=0.62)
    axes.bar_label(bars, [f"{value:.2f} MiB" for value in values], padding=5, size=10, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.25)
    axes.set_title("KV cache of one prompt", size=12, color=INK, loc="left", pad=8)
    axes.tick_params(axis="y", length=0, labelsize=10, labelcolor=INK)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_kl(axes: Any, kls: Sequence[float]) -> None:
    # Layers differ by orders of magnitude, so a linear axis would show one bar; an exact layer has none.
    axes.bar(range(len(kls)), kls, color=PACKED, width=0.7)
    if any(kl > 0 for kl in kls):
        axes.set_yscale("log")
    axes.set_title("KL to the dense model when only this layer is packed", size=12, color=INK, loc="left", pad=8)
    axes.set_xlabel("layer", size=10, color=MUTED)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=MUTED)
    axes.set_xlim(-0.8, len(kls) - 0.2)
    axes.set_ylim(KL_FLOOR, max(max(kls, default=0.0) * 2, 100 * KL_FLOOR))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(text: str, width: int = 16) -> str:
    """An answer that does not reach into the next picture."""
    return (text if len(text) <= width else text[: width - 1] + "…") or "(nothing)"


def _wrapped(text: str, width: int = 24) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])
