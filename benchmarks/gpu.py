"""Everything that a GPU can say, in one command under nine minutes: `python benchmarks/gpu.py`.

Correctness first (the kernel tests, compiled), then decode attention at the targets, whole models, lengths up to 128k, and a sweep of
compute-sanitizer with what is left of the time. Each step is a process of its own with a time limit; results are
written after each, to `benchmarks/results/<device>.json`, and a step that fails or ends early takes nothing from the others. The last
rows hold the figures against the targets. `--device cpu --quick` runs the same steps, tiny, anywhere.
"""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from attend import SHAPES, planned
from harness import Row, machine, print_table, write_json
from steps import HERE, Step, run_steps, script
from targets import LLAVA, QWEN, verdicts, with_time_per_token

BUDGET = 530.0
TESTS = HERE.parent / "tests" / "kernels"
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
RATIO = 8.0
# Of a model that reads half a million tokens: prefill takes most of a step's time.
LONG_PROMPT_LAYERS = "2"
LENGTHS = ("2048", "8192", "32768", "131072")


# Columns of the printed tables.
LABELS = ("shape", "plan", "tokens", "batch")
ATTENTION_FIGURES = ("ratio", "speedup_vs_dense", "speedup_vs_fp8", "limit", "share_of_limit", "predicted_speedup")
DECODING_FIGURES = ("layers", "packed_tokens_per_second", "speedup_vs_dense", "compaction_share")


def tests_step(device: str, quick: bool) -> Step:
    """The kernel tests, compiled on a GPU."""
    where = ("--device", device) if device == "cuda" else ()
    several = ("-n", "8") if device == "cuda" and importlib.util.find_spec("xdist") else ()
    which = ("-k", "attend and not compiles") if quick else ()
    missing = next((name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None), None)
    skip = f"{missing} is not installed" if missing else None if TESTS.is_dir() else f"there is no {TESTS.name}"
    target = TESTS / "test_operations.py" if quick else TESTS
    arguments = ("-P", "-m", "pytest", "-q", "--maxfail", "10", *several, *where, *which, str(target))
    return Step("kernel tests", arguments, 150, skip=skip)


def sanitizer_step(device: str) -> Step:
    """compute-sanitizer over the kernels of one small attention."""
    tool = next((found for name in SANITIZERS if (found := shutil.which(name))), None)
    skip = "needs a GPU" if device != "cuda" else None if tool else "compute-sanitizer is not installed"
    arguments = ("--device", device, "--shape", "SmolLM2-135M", "--tokens", "512", "--batch", "1", "--quick")
    wrapper = (tool or "", "--tool", "memcheck", "--error-exitcode", "9")
    return Step("compute-sanitizer", (str(HERE / "attend.py"), *arguments), 120, wrapper=wrapper, skip=skip)


def chosen(shape: str, relative: bool = True) -> tuple[str, ...]:
    """Options for a shape with the time model's head groups, and its key block or keys as they come."""
    found = planned(SHAPES[shape], RATIO, torch.bfloat16, None, "cuda")
    key_block = str(found.key_block if relative else 0)
    return ("--shape", shape, "--groups", str(found.count), "--key-block", key_block)


def full_steps(device: str) -> list[Step]:
    """The steps on a GPU, most important first."""
    on = ("--device", device)
    qwen_32k, llava_4k = ("--tokens", "32768", "--batch", "16"), ("--tokens", "4096", "--batch", "32")
    shallow = ("--layers", LONG_PROMPT_LAYERS)
    long = (*on, *chosen(QWEN), *shallow)
    steps = [
        tests_step(device, quick=False),
        script("attention, Qwen, 32k x 16", "attend", 50, *on, *chosen(QWEN, False), *qwen_32k),
        script("attention, LLaVA, 4k x 32", "attend", 50, *on, *chosen(LLAVA, False), *llava_4k),
        script("relative keys, Qwen, 32k x 16", "attend", 40, *on, *chosen(QWEN), *qwen_32k, "--ratio", "8"),
        script("relative keys, LLaVA, 4k x 32", "attend", 40, *on, *chosen(LLAVA), *llava_4k, "--ratio", "8"),
        script("decode, Qwen, 8k", "decode", 60, *on, *chosen(QWEN, False), "--tokens", "8192"),
        script("decode, Qwen, 32k x 16", "decode", 80, *long, *qwen_32k),
        script("decode, Qwen, 128k", "decode", 60, *long, "--tokens", "131072"),
    ]
    for name in SHAPES:
        lengths = [x for length in LENGTHS for x in ("--tokens", length)]
        arguments = (*on, *chosen(name, False), "--batch", "1", *lengths, "--quick")
        steps.append(script(f"attention, {name}, one request", "attend", 60, *arguments))
    steps.append(script("decode, LLaVA, 8k", "decode", 60, *on, *chosen(LLAVA), "--tokens", "8192"))
    return [*steps, sanitizer_step(device)]


def quick_steps(device: str) -> list[Step]:
    """The same kinds of steps, tiny."""
    on = ("--device", device, "--quick")
    small = ("--shape", "SmolLM2-135M", "--tokens", "512", "--batch", "1")
    return [
        tests_step(device, quick=True),
        script("attention, SmolLM2", "attend", 60, *on, *small),
        script("decode, SmolLM2", "decode", 90, *on, *small, "--layers", "1", "--key-block", "0"),
        sanitizer_step(device),
    ]


def shown(rows: list[Row], bench: str, columns: tuple[str, ...]) -> list[Row]:
    """These columns of the rows of one benchmark."""
    return [{name: row.get(name) for name in columns} for row in rows if row["bench"] == bench]


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
    json: Annotated[Path | None, typer.Option(help="Default: results/<device>.json next to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny steps: does the command itself work?")] = False,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = BUDGET,
    only: Annotated[
        list[str] | None, typer.Option(help="Part of the names of the steps to run; may be repeated.")
    ] = None,
) -> None:
    """Run every check and benchmark on this machine's GPU, and hold the figures against the targets."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"device={device!r} must be cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device='cuda': torch sees no GPU; --device cpu --quick is a dry run")
    if device == "cpu" and not quick:
        raise typer.BadParameter("device='cpu' needs --quick: the full run is for a GPU")
    steps = quick_steps(device) if quick else full_steps(device)
    if only:
        steps = [step for step in steps if any(part in step.name for part in only)]
    if not steps:
        raise typer.BadParameter(f"only={only!r} is in the name of no step")
    name = re.sub(r"\W+", "-", machine()).strip("-").lower()
    path = json or HERE / "results" / f"{name}.json"

    def keep(rows: list[Row]) -> None:
        measured = with_time_per_token(rows)
        write_json(path, [*measured, *verdicts(measured)], {"device": device, "quick": quick, "budget_seconds": budget})

    rows = with_time_per_token(run_steps(steps, budget, keep))
    attention = shown(rows, "attend", (*LABELS, *ATTENTION_FIGURES))
    decoding = shown(rows, "decode", (*LABELS, *DECODING_FIGURES))
    for title, table in (("decode attention", attention), ("whole models", decoding)):
        if table:
            print_table(title, table)
    print_table("targets", [{k: v for k, v in row.items() if k != "bench"} for row in verdicts(rows)])
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
