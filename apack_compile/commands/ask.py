"""`apack-compile ask`: one question about pictures, answered from a packed cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apack_compile
from apack_compile.checks import size
from apack_compile.commands.data import calibration_data
from apack_compile.commands.subject import demo_question, load_subject, open_picture
from apack_compile.config import AttentionPackConfig
from apack_compile.demo.progress import bar_of, new_console
from apack_compile.files import check_file
from apack_compile.plan.plan import Plan

# What the demo's model is calibrated on.
DEMO_TOKENS = 2_048


@dataclass(frozen=True)
class AskOptions:
    """What `apack-compile ask` was asked for."""

    model: Path | None
    images: Sequence[Path]
    question: str | None
    ratio: float | None
    preset: str | None
    plan: Path | None
    new_tokens: int
    compile: str


def run_ask(options: AskOptions) -> Any:
    """Print the answer as it is generated, then the bytes of its cache; gives the report."""
    images, question = list(options.images), options.question
    if options.model is None and not images and question is None:
        image, question = demo_question()
        images = [image]
    if not question:
        raise ValueError("question: pass --question with what is to be asked")
    if options.new_tokens < 1:
        raise ValueError(f"new-tokens={options.new_tokens} must be at least 1")
    settings = _settings(options)
    pictures = [open_picture(path) for path in images]
    console = new_console()
    with bar_of(console, "loading the model"):
        subject = load_subject(options.model)
        given = subject.question(question, pictures)
        apack_compile.optimize(subject.model, **settings)
    if subject.is_demo and options.plan is None and options.preset is None:
        with bar_of(console, "calibrating on training pictures"):
            apack_compile.calibrate(subject.model, calibration_data(subject, None, DEMO_TOKENS), tokens=DEMO_TOKENS)
    names = ", ".join(map(str, images))
    console.print(f"{names + ': ' if names else ''}{question}", markup=False, highlight=False, soft_wrap=True)
    from transformers import TextStreamer

    streamer = TextStreamer(subject.tokenizer, skip_prompt=True, skip_special_tokens=True)
    subject.model.generate(**given, max_new_tokens=options.new_tokens, do_sample=False, streamer=streamer)
    report = apack_compile.report(subject.model)
    for line in cache_lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return report


def cache_lines(report: Any) -> Iterator[str]:
    """The bytes of the last cache, and the report's notes."""
    if report.bytes:
        held = report.bytes
        yield (
            f"cache: {held['tokens']:,} tokens in {size(held['sequence_bytes'])} instead of {size(held['dense_bytes'])} in 16 bits "
            f"({held['ratio']:.2f}x); bases shared by all requests {size(held['model_bytes'])}"
        )
    for note in report.notes:
        yield f"note: {note}"


def _settings(options: AskOptions) -> dict[str, Any]:
    """Arguments of `optimize`; raises ValueError for what no model could be given, OSError for a plan that cannot be read."""
    # a question is short, and its cache is to be seen
    if options.plan is None:
        return {
            "config": AttentionPackConfig(
                ratio=options.ratio, preset=options.preset, compile=options.compile, min_tokens=0
            )
        }
    if options.ratio is not None or options.preset is not None:
        raise ValueError("plan: excludes --ratio and --preset; a plan says itself what streams get")
    check_file(options.plan, "plan", "a plan that `apack-compile calibrate` wrote")
    return {"plan": Plan.load(options.plan), "compile": options.compile, "min_tokens": 0}
