"""Rate and distortion: what a small KV cache costs in quality, ours beside what else can be had.

`python benchmarks/quality.py --text`: KL against the dense cache on long text. `--vision`: answers and KL about pictures. `--peers`
adds the other systems (benchmarks/requirements-peers.txt), `--kvpress-python` the presses. A system that is not installed or
fails is listed with its reason.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness import print_table, write_json
from measure import Measured, Prompt, Trial, measure
from peers import peer_systems
from presses import PressJob, add_trial, not_run, press_versions, run_presses
from systems import System, dense_systems, own_systems, packed, preset_systems
from tables import shown, tables_of
from text_quality import PLACES, TextOptions, text_prompts
from torch import nn
from vision_quality import turn_prompts, vision_prompts

from apack_compile import AttentionPackConfig
from apack_compile.demo.assets import load_model, load_tokenizer

RATIOS, PEER_RATIOS = (4.0, 6.0, 8.0), (2.0, 4.0, 6.0, 8.0, 16.0)
NEEDLE_IMAGES = 16
QUICK_QUESTIONS = 16
Results = list[tuple[Trial, list[Measured]]]


@dataclass(frozen=True)
class Wanted:
    """What a run measures; it goes into the JSON."""

    text: bool
    vision: bool
    needle: bool
    turns: bool
    continuation: bool
    ratios: tuple[float, ...]
    prefixes: tuple[int, ...]
    scored: int
    images: tuple[int, ...]
    questions: int
    places: tuple[int, ...]
    conversations: int


def measure_all(
    model: nn.Module, prompts: Iterable[Prompt], systems: Sequence[System], job: PressJob | None
) -> Results:
    """Every prompt over every system; trials are left for the presses where there is a job."""
    results: Results = []
    for prompt in prompts:
        references = prompt.ask(model, prompt.trial.scripts)
        if job is not None:
            add_trial(job, model, prompt.trial, references)
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
    presets: Annotated[bool, typer.Option("--presets", help="The published presets too (also with --peers).")] = False,
    kvpress_python: Annotated[Path | None, typer.Option(help="Python of an environment with kvpress.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One place, 16 questions, one conversation.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw ratio against quality here (PNG).")] = None,
) -> None:
    """Measure the quality of packed caches and their peers."""
    wanted = Wanted(
        text=text or continuation,
        vision=vision or needle,
        needle=needle,
        turns=turns,
        continuation=continuation,
        ratios=tuple(ratio or (PEER_RATIOS if peers else RATIOS)),
        prefixes=tuple(prefix),
        scored=scored,
        images=tuple(dict.fromkeys([*images, *([NEEDLE_IMAGES] if needle else [])])),
        questions=QUICK_QUESTIONS if quick else questions,
        places=PLACES[:1] if quick else PLACES,
        conversations=1 if quick else 4,
    )
    if not (wanted.text or wanted.vision or wanted.turns):
        raise typer.BadParameter("choose what to measure: --text, --vision, --needle, --turns or --continuation")
    model, tokenizer = load_model(), load_tokenizer()
    extra = [packed_from(options) for options in config or []]
    published = preset_systems() if presets or peers else []
    systems = [*dense_systems(), *own_systems(wanted.ratios), *extra, *published, *(peer_systems() if peers else [])]
    benches, versions = run(model, tokenizer, systems, wanted, kvpress_python, peers)
    tables = tables_of(tokenizer, benches, continuation, needle)
    for (_, title), rows in tables.items():
        print_table(title, [shown(row) for row in rows])
    rows = [{"bench": bench, **row} for (bench, _), table in tables.items() for row in table]
    if json_path is not None:
        write_json(json_path, rows, {**asdict(wanted), **versions})
    if plot is not None:
        # matplotlib is needed for a picture alone
        from pareto import draw_all

        draw_all(plot, rows)


def run(
    model: nn.Module,
    tokenizer: Any,
    systems: Sequence[System],
    wanted: Wanted,
    kvpress_python: Path | None,
    peers: bool,
) -> tuple[dict[str, Results], dict[str, str]]:
    """Results by bench, and versions of the presses' environment."""
    versions, reason = press_versions(kvpress_python)
    benches: dict[str, Results] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = PressJob(kvpress_python, Path(folder)) if reason is None else None
        for bench, prompts in prompts_of(model, tokenizer, wanted).items():
            benches[bench] = measure_all(model, prompts, systems, job)
        if not peers and job is None:
            return benches, versions
        found = iter(run_presses(job, model, tokenizer) if job is not None else repeat(not_run(reason)))
        return {name: [(t, [*m, *next(found)]) for t, m in results] for name, results in benches.items()}, versions


def prompts_of(model: nn.Module, tokenizer: Any, wanted: Wanted) -> dict[str, Iterator[Prompt]]:
    """Prompts by bench, made as they are asked for."""
    text = TextOptions(wanted.prefixes, wanted.scored, wanted.places, wanted.continuation)
    prompts = {
        "text": text_prompts(model, tokenizer, text) if wanted.text else None,
        "vision": vision_prompts(model, tokenizer, wanted.images, wanted.questions) if wanted.vision else None,
        "turns": turn_prompts(model, tokenizer, wanted.conversations) if wanted.turns else None,
    }
    return {name: some for name, some in prompts.items() if some is not None}


def packed_from(text: str) -> System:
    """A row of ours by its configuration in JSON."""
    config = AttentionPackConfig.from_json(text)
    options = {name: value for name, value in vars(config).items() if name != "compile"}
    return packed("apack-compile, as configured", text, reads_prompt=config.ratio is None, **options)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
