"""A report as a matplotlib figure."""

from collections.abc import Mapping
from typing import Any

INK, MUTED = "#1f2430", "#7a8190"
DENSE, PACKED, BASES = "#aab4c5", "#2f6fde", "#a9c4f5"


def figure_of(report: Mapping[str, Any]) -> Any:
    """Bytes of the last cache beside those of a token in each layer; raises ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib: pip install 'apack-compile[plot]'; save('report.html') needs nothing",
            name="matplotlib",
        ) from error
    figure = Figure(figsize=(11, 3.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"apack-compile: {report['setting']}", size=12, color=INK)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    _draw_cache(left, report["bytes"])
    _draw_layers(right, report)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, labelcolor=INK)
    return figure


def _draw_cache(axes: Any, held: Mapping[str, Any] | None) -> None:
    axes.set_title("Bytes of the last cache", size=10, color=INK, loc="left")
    if held is None:
        axes.text(0.5, 0.5, "no cache so far", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    values = [held[name] / 1e6 for name in ("dense_bytes", "sequence_bytes", "model_bytes")]
    bars = axes.barh(["dense, 16 bits", "packed", "bases, for all"], values, color=[DENSE, PACKED, BASES])
    axes.bar_label(bars, [f"{value:,.2f} MB" for value in values], padding=4, size=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_xticks([])


def _draw_layers(axes: Any, report: Mapping[str, Any]) -> None:
    layers = report["layer_bytes"]
    axes.set_title("Bytes of a token, by layer", size=10, color=INK, loc="left")
    if not layers:
        axes.text(0.5, 0.5, "no plan so far", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    numbers = [layer["layer"] for layer in layers]
    axes.bar(numbers, [layer["dense"] for layer in layers], color=DENSE, label="dense, 16 bits")
    axes.bar(numbers, [layer["packed"] for layer in layers], color=PACKED, label="packed")
    axes.set_xlabel(f"layer; planned for {report['planned_for']}", size=9, color=MUTED)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.16))
