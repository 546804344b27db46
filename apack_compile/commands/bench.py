"""`apack-compile bench`: a model's decode speed and cache bytes, dense and packed, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch

import apack_compile
from apack_compile.backend.inner_compiler import resolve_compile
from apack_compile.commands.subject import Subject, load_subject
from apack_compile.config import DEFAULT_RATIO, AttentionPackConfig
from apack_compile.demo.evaluate import StepClock, dense_cache
from apack_compile.demo.progress import new_console, progress_bars
from apack_compile.models.cache_argument import with_cache

CALIBRATION_TOKENS = 2_048
# Turns of which the first one compiles.
TURNS = 3


@dataclass(frozen=True)
class BenchOptions:
    """What `apack-compile bench` was asked for."""

    model: Path | None = None
    ratio: float | None = None
    preset: str | None = None
    tokens: int = 1_024
    batch: int = 1
    new_tokens: int = 16
    compile: str = "auto"


@dataclass(frozen=True)
class Way:
    """A way to decode: a cache for each turn, None for one that generate makes, and what generate is given besides."""

    name: str
    new_cache: Callable[[], Any]
    arguments: dict[str, Any]


def run_bench(options: BenchOptions) -> list[dict[str, Any]]:
    """Time decode steps in turns and print a table; gives its rows."""
    for name, least in (("tokens", 1), ("batch", 1), ("new_tokens", 3)):
        if getattr(options, name) < least:
            raise ValueError(f"{name.replace('_', '-')}={getattr(options, name)} must be at least {least}")
    config = AttentionPackConfig(ratio=options.ratio, preset=options.preset, compile=options.compile, min_tokens=0)
    console = new_console()
    with progress_bars(console) as progress:
        task = progress.add_task("loading the model", total=None)
        subject = load_subject(options.model)
        model = apack_compile.optimize(subject.model, config)
        ids = text_ids(subject, options.tokens + CALIBRATION_TOKENS)
        progress.remove_task(task)
        if options.preset is None:
            task = progress.add_task("calibrating", total=None)
            apack_compile.calibrate(model, subject.text(ids[options.tokens :]))
            progress.remove_task(task)
        prompt = {name: x.repeat(options.batch, 1) for name, x in subject.text(ids[: options.tokens]).items()}
        ways = ways_of(model, options)
        seconds: dict[str, list[float]] = {way.name: [] for way in ways}
        task = progress.add_task("decoding", total=TURNS * len(ways))
        for turn in range(TURNS):
            for way in ways:
                cache, clock = way.new_cache(), StepClock()
                given = prompt if cache is None else with_cache(model, prompt, cache)
                length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
                model.generate(**given, **length, do_sample=False, streamer=clock, **way.arguments)
                seconds[way.name] += clock.steps() if turn else []
                progress.advance(task)
    held = cache.report()
    rows = [row_of(way.name, median(seconds[way.name]), options.batch, held) for way in ways]
    title = f"{subject.name}, prompts of {options.tokens:,} tokens, batch {options.batch}, {model.device.type}"
    print_rows(console, title, rows)
    return rows


def ways_of(model: Any, options: BenchOptions) -> list[Way]:
    """Dense as transformers decodes by default, dense compiled where packed steps are, and packed, last."""
    from transformers import CompileConfig

    ways = [Way("dense, DynamicCache", lambda: dense_cache(model), {})]
    inner, _ = resolve_compile(options.compile, model.device.type)
    if inner is not None:
        config = CompileConfig(backend=inner, mode=None)
        config._compile_all_devices = True
        given = {"cache_implementation": "static", "compile_config": config}
        ways.append(Way(f"dense, StaticCache, {inner}", lambda: None, given))
    said = f"preset {options.preset}" if options.preset else f"ratio {options.ratio or DEFAULT_RATIO:g}"
    ways.append(Way(f"packed, {said}, {inner or 'not compiled'}", lambda: apack_compile.new_cache(model), {}))
    return ways


def text_ids(subject: Subject, count: int) -> torch.Tensor:
    """Token ids `[count]` of a text that ships with Python, as often as it takes."""
    ids = torch.tensor(subject.tokenizer("\n".join(topics.values())).input_ids)
    return ids.repeat(-(-count // len(ids)))[:count]


def row_of(name: str, seconds: float, batch: int, held: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    is_packed = name.startswith("packed")
    return {
        "way": name,
        "tokens a second": batch / seconds,
        "step, ms": 1e3 * seconds,
        "cache, bytes": held["sequence_bytes"] if is_packed else held["dense_bytes"],
        "shared bases, bytes": held["model_bytes"] if is_packed else 0,
    }


def print_rows(console: Any, title: str, rows: list[dict[str, Any]]) -> None:
    """The table; bytes of a dense cache are those of 16 bits a number."""
    from rich.table import Table

    table = Table(title=title, header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(
            *(
                f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
                for value in row.values()
            )
        )
    console.print(table)
    console.print(
        "medians of decode steps that take turns; a dense cache is counted in 16 bits a number", highlight=False
    )
