"""Steps of a long benchmark: each a process of its own, with a time limit, inside one budget."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Row

HERE = Path(__file__).parent
# Seconds under which a step is not worth starting.
LEAST_SECONDS = 5
NOTE_CHARACTERS = 400


@dataclass(frozen=True)
class Step:
    """A command, its time limit in seconds, and what its rows are called; `bench` is None for one that writes no rows.

    wrapper: a command that runs it. skip: why it cannot run, if so.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    bench: str | None = None
    wrapper: tuple[str, ...] = ()
    skip: str | None = None


def script(name: str, bench: str, limit: float, *arguments: str) -> Step:
    """A step that runs a benchmark script."""
    return Step(name, (str(HERE / f"{bench}.py"), *arguments), limit, bench)


def run_step(step: Step, seconds: float) -> tuple[Row, list[Row]]:
    """A row about the step, and the rows that it wrote, also when it failed later; it ends after `seconds` at the latest."""
    if step.skip is not None:
        return about(step, "skipped", 0.0, step.skip), []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [*step.wrapper, sys.executable, *step.arguments]
        command += ["--json", str(result)] if step.bench else []
        start = time.perf_counter()
        status, output = run(command, seconds)
        took = time.perf_counter() - start
        try:
            rows = json.loads(result.read_text())["rows"] if step.bench else []
        except (OSError, ValueError, KeyError):
            rows = []
            status = "wrote no rows" if status == "ok" else status
    note = output[-NOTE_CHARACTERS:] if status != "ok" else "" if step.bench else last_line(output)
    return about(step, status, took, note), [{"bench": step.bench, **row} for row in rows]


def run(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Status and output of a command; it and the processes that it started are ended after `seconds`."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"ended after {seconds:.0f} s", output
    return "ok" if process.returncode == 0 else f"failed with {process.returncode}", output


def about(step: Step, status: str, seconds: float, note: str) -> Row:
    """The row that says how a step went."""
    return {"bench": "steps", "step": step.name, "status": status, "step_seconds": seconds, "note": note}


def last_line(output: str) -> str:
    """The last line with something in it."""
    return next((line for line in reversed(output.splitlines()) if line.strip()), "")[-NOTE_CHARACTERS:]


def run_steps(steps: Sequence[Step], budget: float, keep: Callable[[list[Row]], None]) -> list[Row]:
    """All rows of all steps, in `budget` seconds; `keep` gets those so far after each step."""
    end = time.perf_counter() + budget
    rows: list[Row] = []
    for step in steps:
        left = end - time.perf_counter()
        if left < LEAST_SECONDS:
            how, found = about(step, "skipped", 0.0, f"no time left of {budget:.0f} s"), []
        else:
            how, found = run_step(step, min(step.limit, left))
        print(f"{step.name}: {how['status']}, {how['step_seconds']:.0f} s, {how['note']}", flush=True)
        rows += [how, *found]
        keep(rows)
    return rows
