"""Rate and distortion: what a small KV cache costs in quality, ours beside what else can be had.

`python benchmarks/quality.py --text`: KL against the dense cache on long text. `--vision`: answers and KL about pictures. `--peers`
adds the other systems (benchmarks/requirements-peers.txt), `--kvpress-python` the presses. A system that is not installed or
fails is listed with its reason.
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import text_quality
import torch
import typer
import vision_quality
from harness import Row, print_table, write_json
from measure import Measured, Prompt, Trial, measure
from presses import NO_KVPRESS, PressJob, add_trial, not_run, press_versions, run_presses
from systems import System, dense_system, own_systems, packed, peer_systems

from apack_compile.demo.assets import load_model, load_tokenizer

RATIOS, PEER_RATIOS = (4.0, 6.0, 8.0), (2.0, 4.0, 6.0, 8.0, 16.0)
NEEDLE_IMAGES = 16
Results = list[tuple[Trial, list[Measured]]]


def measure_all(
    model: torch.nn.Module, prompts: Iterable[Prompt], systems: Sequence[System], job: PressJob | None
) -> Results:
    """Every prompt over every system; trials are left for the presses where there is a job."""
    results: Results = []
    for prompt in prompts:
        references = prompt.ask(model, prompt.trial.scripts)
        if job is not None:
            add_trial(job, prompt.trial, references)
        results.append((prompt.trial, measure(model, prompt, references, systems)))
        print(f"measured {prompt.trial.labels}", file=sys.stderr, flush=True)
    return results


def main(
    text: Annotated[bool, typer.Option("--text", help="Long text.")] = False,
    vision: Annotated[bool, typer.Option("--vision", help="Questions about pictures.")] = False,
    needle: Annotated[
        bool, typer.Option("--needle", help="Answers by the position of the picture asked about.")
    ] = False,
    turns: Annotated[bool, typer.Option("--turns", help="KL over the turns of a conversation.")] = False,
    continuation: Annotated[
        bool, typer.Option("--continuation", help="KL over 200 greedy tokens, by quarter.")
    ] = False,
    ratio: Annotated[list[float] | None, typer.Option(help="Ratios of ours; 4, 6, 8 (with peers 2 to 16).")] = None,
    config: Annotated[list[str] | None, typer.Option(help="A row more: a configuration as JSON.")] = None,
    prefix: Annotated[list[int], typer.Option(help="Tokens before the scored ones.")] = [6_144],  # noqa: B006
    scored: Annotated[int, typer.Option(help="Scored tokens.")] = 192,
    images: Annotated[list[int], typer.Option(help="Pictures per prompt.")] = [1, 4, 16],  # noqa: B006
    questions: Annotated[int, typer.Option(help="Questions for each number of pictures.")] = 48,
    peers: Annotated[bool, typer.Option("--peers", help="Other systems too.")] = False,
    kvpress_python: Annotated[Path | None, typer.Option(help="Python of an environment with kvpress.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One place, 16 questions, one conversation.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw ratio against quality here (PNG).")] = None,
) -> None:
    """Measure the quality of packed caches and their peers."""
    text, vision = text or continuation, vision or needle
    if not (text or vision or turns):
        raise typer.BadParameter("choose what to measure: --text, --vision, --needle, --turns or --continuation")
    model, tokenizer = load_model(), load_tokenizer()
    ratios = ratio or (PEER_RATIOS if peers else RATIOS)
    extra = [packed_from(options) for options in config or []]
    systems = [dense_system(), *own_systems(ratios), *extra, *(peer_systems() if peers else [])]
    with tempfile.TemporaryDirectory() as folder:
        job = PressJob(kvpress_python, Path(folder)) if kvpress_python is not None else None
        benches: dict[str, Results] = {}
        if text:
            places = text_quality.PLACES[:1] if quick else text_quality.PLACES
            options = text_quality.TextOptions(tuple(prefix), scored, places, continuation)
            benches["text"] = measure_all(model, text_quality.text_prompts(model, tokenizer, options), systems, job)
        if vision:
            chosen = tuple(dict.fromkeys([*images, *([NEEDLE_IMAGES] if needle else [])]))
            options = vision_quality.VisionOptions(chosen, 16 if quick else questions)
            prompts = vision_quality.vision_prompts(model, tokenizer, options)
            benches["vision"] = measure_all(model, prompts, systems, job)
        if turns:
            prompts = vision_quality.turn_prompts(model, tokenizer, 1 if quick else 4)
            benches["turns"] = measure_all(model, prompts, systems, job)
        if peers or job is not None:
            found = iter(run_presses(job, model, tokenizer) if job is not None else repeat(not_run(NO_KVPRESS)))
            benches = {name: [(t, [*m, *next(found)]) for t, m in results] for name, results in benches.items()}
    tables = tables_of(tokenizer, benches, continuation, needle)
    for (_, title), rows in tables.items():
        print_table(title, [shown(row) for row in rows])
    if json_path is not None:
        rows = [{"bench": bench, **row} for (bench, _), rows in tables.items() for row in rows]
        settings = {"command": sys.argv[1:], **(press_versions(kvpress_python) if kvpress_python is not None else {})}
        write_json(json_path, rows, settings)
    if plot is not None:
        draw_all(plot, tables)


def tables_of(
    tokenizer: Any, benches: dict[str, Results], continuation: bool, needle: bool
) -> dict[tuple[str, str], list[Row]]:
    """Tables by bench and title."""
    tables: dict[tuple[str, str], list[Row]] = {}
    if "text" in benches:
        results = benches["text"]
        tables["text-place", "KL against the dense cache, by place"] = text_quality.text_rows(results)
        tables["text", "mean over places"] = text_quality.text_means(results)
        if continuation:
            tables["continuation", "KL over a greedy continuation"] = text_quality.continuation_rows(results)
    if "vision" in benches:
        results = benches["vision"]
        tables["vision", "questions about pictures"] = vision_quality.vision_rows(tokenizer, results, False)
        if needle:
            rows = vision_quality.vision_rows(tokenizer, results, True)
            tables["needle", "by the position of the picture asked about"] = rows
    if "turns" in benches:
        tables["turns", "KL over the turns of a conversation"] = vision_quality.turn_rows(benches["turns"])
    return tables


def shown(row: Row) -> Row:
    """A row as it is printed: the reason in the note's place, decoded copies left to the JSON."""
    kept = {name: value for name, value in row.items() if name not in ("reason", "note", "decoded_bytes")}
    return {**kept, "note": (row["reason"] or row.get("note", ""))[:60]}


def draw_all(path: Path, tables: dict[tuple[str, str], list[Row]]) -> None:
    """A picture for text and one for pictures; both were measured: each with its name behind the path's stem."""
    from pareto import draw

    pictures = {bench: rows for (bench, _), rows in tables.items() if bench in ("text", "vision")}
    for bench, rows in pictures.items():
        unit = "tokens" if bench == "text" else "pictures"
        titles = {row[unit]: f"{row[unit]:,} {unit if row[unit] > 1 else unit[:-1]}" for row in rows}
        target = path if len(pictures) == 1 else path.with_stem(f"{path.stem}-{bench}")
        draw(target, [{**row, "panel": row[unit]} for row in rows], titles)


def packed_from(text: str) -> System:
    """A row of ours by its configuration in JSON."""
    options = json.loads(text)
    return packed("apack-compile, as configured", options.get("preset") or text, **options)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
