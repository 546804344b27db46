"""The rate-distortion picture: bytes held against KL or accuracy, one line per family of caches.

`python benchmarks/pareto.py RESULTS.json PICTURE.png` draws what quality.py wrote.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from harness import Row
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from systems import OURS

INK, MUTED, GRID, HIGHLIGHT = "#1f2430", "#7a8190", "#e3e6ec", "#2f6fde"
COLORS = (
    "#d1662b",
    "#1d8a4b",
    "#8b5bbf",
    "#b3892a",
    "#c03a6b",
    "#4f7f86",
    "#8a6d5a",
    "#5f6b85",
    "#7fa03c",
    "#a14a3a",
    "#2b2f77",
)
MARKERS = "osD^vP<>X*h"
RATIO_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
KL_FLOOR = 1e-6
# Families whose points are variants, not a dial.
POINTS = ("fp8", "turboquant", "AttentionPack")
PANEL = (9.0, 4.3)


def draw_all(path: Path, rows: Sequence[Row]) -> None:
    """A picture of the text rows and one of the vision rows; where there are both, each has its name behind the path's stem."""
    pictures = {bench: [row for row in rows if row["bench"] == bench] for bench in ("text", "vision")}
    pictures = {bench: chosen for bench, chosen in pictures.items() if chosen}
    for bench, chosen in pictures.items():
        unit = "tokens" if bench == "text" else "pictures"
        titles = {row[unit]: f"{row[unit]:,} {unit if row[unit] > 1 else unit[:-1]}" for row in chosen}
        target = path if len(pictures) == 1 else path.with_stem(f"{path.stem}-{bench}")
        draw(target, [{**row, "panel": row[unit]} for row in chosen], titles)


def draw(path: Path, rows: Sequence[Row], titles: dict[str, str]) -> None:
    """Write a picture with a panel per group of rows; `titles` names the rows' "panel" values in order.

    A panel shows "kl" on a log axis; where its rows have "accuracy", a second one beside it shows that.
    """
    measured = [row for row in rows if row.get("reason") is None and row["held_ratio"] is not None]
    families = list(dict.fromkeys(row["system"] for row in measured))
    looks = _looks(families)
    two = any("accuracy" in row for row in measured)
    height = PANEL[1] * len(titles) + 0.3 * -(-len(families) // 4) + 0.5
    figure = Figure(figsize=(PANEL[0], height), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(titles), 2 if two else 1, squeeze=False)
    for axes, (panel, title) in zip(grid, titles.items(), strict=True):
        chosen = [row for row in measured if row["panel"] == panel]
        _panel(axes[0], chosen, looks, "kl", f"{title}: KL to the dense cache, nats a token")
        if two:
            _panel(axes[1], chosen, looks, "accuracy", f"{title}: right answers")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines if line.get_label() in looks}
    figure.legend(
        list(lines.values()),
        list(lines),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    figure.savefig(path)


def _looks(families: Sequence[str]) -> dict[str, dict[str, object]]:
    """Colour, marker and weight of each family's line."""
    looks: dict[str, dict[str, object]] = {}
    others = [family for family in families if family not in (OURS, "dense")]
    for index, family in enumerate(others):
        look = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        line = {"linestyle": "none" if family in POINTS else "-", "linewidth": 1.2}
        looks[family] = {**look, **line, "markersize": 5, "zorder": 2, "alpha": 0.9}
    looks[OURS] = {"color": HIGHLIGHT, "marker": "o", "linewidth": 3, "markersize": 7.5, "zorder": 4}
    return looks


def _panel(axes: Axes, rows: Sequence[Row], looks: dict[str, dict[str, object]], name: str, title: str) -> None:
    dense = [(row["setting"], row[name]) for row in rows if row["system"] == "dense"]
    # shares of answers lie too near to one another for a second label
    lines = [(setting, level) for setting, level in dense if level > KL_FLOOR] if name == "kl" else dense[:1]
    for family in dict.fromkeys(row["system"] for row in rows):
        points = sorted((row["held_ratio"], row[name]) for row in rows if row["system"] == family)
        if family == "dense":
            continue
        shown = [max(value, KL_FLOOR) if name == "kl" else value for _, value in points]
        axes.plot([ratio for ratio, _ in points], shown, label=family, **looks[family])
    for setting, level in lines:
        axes.axhline(level, color=MUTED, linewidth=1, linestyle=":", zorder=1)
        place = {"ha": "left", "va": "bottom", "transform": axes.get_yaxis_transform()}
        axes.text(0.01, level, f"dense, {setting}", color=MUTED, size=9, **place)
    if name == "kl":
        axes.set_yscale("log")
    else:
        axes.set_ylim(-0.03, 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xscale("log")
    axes.set_xticks(RATIO_TICKS, [f"{tick:g}x" for tick in RATIO_TICKS])
    axes.xaxis.set_minor_formatter(NullFormatter())
    ratios = [row["held_ratio"] for row in rows if row["system"] != "dense"]
    axes.set_xlim(min(ratios) * 0.9, max(ratios) * 1.1)
    axes.set_title(title, size=11, color=INK, loc="left", pad=8)
    axes.set_xlabel("times smaller than a 16-bit dense cache (bytes held)", size=9.5, color=MUTED)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main(results: Path, picture: Path) -> None:
    """Draw the rows of a results file."""
    draw_all(picture, json.loads(results.read_text())["rows"])


if __name__ == "__main__":
    typer.run(main)
