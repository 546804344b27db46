"""The demo from start to end: load, optimize, calibrate, ask, time, print, draw."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apack_compile
from apack_compile.checks import size
from apack_compile.config import AttentionPackConfig
from apack_compile.demo.album import PARTS, show_album
from apack_compile.demo.assets import load_model, load_questions, load_tokenizer
from apack_compile.demo.evaluate import (
    Results,
    ask_all,
    calibration_inputs,
    decode_time_ratio,
    question_sets,
)
from apack_compile.demo.plot import check_matplotlib, draw
from apack_compile.demo.progress import new_console, progress_bars

SHOWN_ROWS = 16
# Presets whose rows can share a prompt, and pictures that fit in the model's 8,192 positions with a question.
SHARING = (None, "lossless")
MOST_PICTURES = 100


@dataclass(frozen=True)
class DemoOptions:
    """What `apack-compile demo` was asked for."""

    ratio: float | None = None
    preset: str | None = None
    images_per_prompt: int = 4
    questions: int = 24
    album: int = 16
    compile: str = "auto"
    seed: int = 0
    json_path: Path | None = None
    png_path: Path | None = Path("apack-demo.png")


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs the demo, prints it, writes its files, returns the summary that `--json` writes."""
    # prompts are short on purpose: what a packed cache answers is to be seen
    config = AttentionPackConfig(ratio=options.ratio, preset=options.preset, compile=options.compile, min_tokens=0)
    for path in (options.json_path, options.png_path):
        _check_writable(path)
    if not 0 <= options.album <= MOST_PICTURES:
        raise ValueError(f"album={options.album} must be between 0 and {MOST_PICTURES}")
    if options.png_path is not None:
        check_matplotlib()
    pictures = load_questions("test", options.seed)
    sets = question_sets(pictures, options.questions, options.images_per_prompt)
    console = new_console()
    with progress_bars(console) as progress:
        task = progress.add_task("loading the model", total=None)
        tokenizer, model = load_tokenizer(), load_model()
        progress.remove_task(task)
        apack_compile.optimize(model, config)
        if config.ratio is not None:
            task = progress.add_task("calibrating on training pictures", total=None)
            training = load_questions("train", options.seed)
            apack_compile.calibrate(model, calibration_inputs(tokenizer, training, options.images_per_prompt))
            progress.remove_task(task)

        def new_packed() -> Any:
            return apack_compile.new_cache(model)

        task = progress.add_task("asking", total=options.questions)
        results = ask_all(model, tokenizer, sets, new_packed, lambda: progress.advance(task))
        task = progress.add_task("timing decode", total=None)
        time_ratio = decode_time_ratio(model, tokenizer, sets[0], new_packed)
        progress.remove_task(task)
        album = None
        if options.album and config.preset in SHARING:
            task = progress.add_task(f"an album of {options.album} pictures", total=PARTS)
            with tempfile.TemporaryDirectory() as folder:
                chosen = [group[0] for group in pictures[: options.album]]
                album = show_album(model, tokenizer, chosen, Path(folder), lambda: progress.advance(task))
    summary = summarize(results, time_ratio) | ({} if album is None else album.figures)
    _print(console, _title(config, options), results, summary)
    if options.album and album is None:
        console.print(f"no album: rows of preset={config.preset!r} share no tokens", highlight=False)
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(summary, indent=2) + "\n")
        console.print(f"wrote {options.json_path}")
    if options.png_path is not None:
        draw(options.png_path, _title(config, options), results, summary)
        console.print(f"wrote {options.png_path}")
    return summary


def summarize(results: Results, time_ratio: float) -> dict[str, Any]:
    """The flat object of `--json`; bytes are means over the questions."""
    rows, reports = results.rows, results.reports
    count = len(rows)

    def mean(name: str) -> float:
        return sum(report[name] for report in reports) / count

    return {
        "ratio": mean("dense_bytes") / mean("sequence_bytes"),
        "answers_equal": sum(row.dense == row.packed for row in rows) / count,
        "texts_equal": sum(row.same_text for row in rows) / count,
        "accuracy_dense": sum(row.dense == row.question.answer for row in rows) / count,
        "accuracy_packed": sum(row.packed == row.question.answer for row in rows) / count,
        "dense_bytes": round(mean("dense_bytes")),
        "sequence_bytes": round(mean("sequence_bytes")),
        "model_bytes": max(report["model_bytes"] for report in reports),
        "tokens_per_prompt": sum(results.prompt_tokens) / count,
        "questions": count,
        "decode_time_ratio": time_ratio,
    }


def _title(config: AttentionPackConfig, options: DemoOptions) -> str:
    chosen = f"preset {config.preset}" if config.preset else f"ratio {config.ratio:g}"
    images = options.images_per_prompt
    return f"{chosen}, {images} picture{'s' if images > 1 else ''} per prompt"


def _check_writable(path: Path | None) -> None:
    """Fails before minutes of work rather than after them."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.resolve().parent} does not exist")


def _print(console: Any, title: str, results: Results, summary: dict[str, Any]) -> None:
    """The table of answers and the summary below it."""
    from rich.table import Table

    table = Table(title=title, header_style="bold")
    for name in ("picture", "question", "truth", "dense", "packed"):
        table.add_column(name)
    hidden = 0
    for index, row in enumerate(results.rows):
        same = row.dense == row.packed
        if index >= SHOWN_ROWS and same:
            hidden += 1
            continue
        answers = [_colored(text, row.question.answer) for text in (row.dense, row.packed)]
        style = None if same else "reverse"
        table.add_row(row.question.image.name, row.shown, row.question.answer, *answers, style=style)
    console.print(table)
    if hidden:
        console.print(f"... and {hidden} more questions with equal answers")
    for line in summary_lines(summary):
        console.print(line, highlight=False)


def _colored(text: str, truth: str) -> Any:
    from rich.text import Text

    return Text(text, style="green" if text == truth else "red")


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The figures in words."""
    lines = [
        f"accuracy over {summary['questions']} questions: "
        f"dense {summary['accuracy_dense']:.1%}, packed {summary['accuracy_packed']:.1%}; "
        f"answers equal {summary['answers_equal']:.1%}",
        f"KV cache of a prompt ({summary['tokens_per_prompt']:.0f} tokens): "
        f"dense {size(summary['dense_bytes'])} (16-bit), packed {size(summary['sequence_bytes'])}, "
        f"{summary['ratio']:.2f}x smaller; bases shared by all requests {size(summary['model_bytes'])}",
        f"time of a decode step: packed / dense = {summary['decode_time_ratio']:.2f} (packed at any length, min_tokens=0)",
    ]
    return lines + (album_lines(summary) if "album_pictures" in summary else [])


def album_lines(summary: dict[str, Any]) -> list[str]:
    """The figures of an album in words."""
    return [
        f"an album of {summary['album_pictures']} pictures ({summary['album_tokens']} tokens), read once, "
        f"{summary['album_pictures']} questions at once: answers as from a dense cache {summary['album_answers_equal']:.1%}, "
        f"right {summary['album_accuracy_shared']:.1%} (dense {summary['album_accuracy_dense']:.1%})",
        f"saved to a file of {size(summary['album_file_bytes'])}, loaded and asked by another process: "
        f"answers equal {summary['reloaded_answers_equal']:.1%}",
        f"{summary['branches']} requests about it: dense {size(summary['dense_bytes_of_branches'])}, "
        f"packed {size(summary['copied_bytes_of_branches'])}, packed once for all {size(summary['shared_bytes_of_branches'])}; "
        f"a step takes {summary['shared_prefix_step_ratio']:.2f} of one over copies",
        f"albums in 1 GiB: dense {summary['dense_requests_in_gib']}, packed {summary['packed_requests_in_gib']}",
        f"tokens a second in the bytes of {summary['dense_requests']} dense requests: "
        f"dense {summary['dense_tokens_per_second']:.0f}, packed {summary['packed_tokens_per_second']:.0f} "
        f"with {summary['packed_requests']} requests, {summary['throughput_at_equal_bytes']:.1f} times (steps not compiled)",
    ]
