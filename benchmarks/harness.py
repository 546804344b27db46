"""What all benchmarks share: how calls are timed, how results are written and printed."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
PEERS = ("hqq", "optimum-quanto", "turboquant-vllm")
# Instructions of x86 for integers and numbers of 16 bits.
FEW_BITS = ("avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
WIDTH = 180
WARM_UP = 3
# A sample is as many calls as take this long, so that the clock and a launch weigh little.
SAMPLE_SECONDS = 5e-4


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, first and last decile over the samples."""

    median: float
    low: float
    high: float


def timed(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one call, the mean of `repeats` in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float, device: str = "cpu") -> dict[str, Timing]:
    """Timings of calls that take turns for about `seconds` in all, after a warm-up: what disturbs one disturbs all."""
    repeats, samples = {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        repeats[name] = max(1, round(SAMPLE_SECONDS / min(timed(call, 1, device) for _ in range(WARM_UP))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 10:
        for name, call in calls.items():
            samples[name].append(timed(call, repeats[name], device))
    return {name: Timing(*_quantiles(torch.tensor(found, dtype=torch.float64))) for name, found in samples.items()}


def _quantiles(samples: torch.Tensor) -> tuple[float, float, float]:
    median, low, high = torch.quantile(samples, torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)).tolist()
    return median, low, high


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.zeros(2**27 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, 0.5, device)["copy"]
    return 2 * source.numel() * source.element_size() / timing.median


def thread_speedup() -> float:
    """How much faster all threads raise numbers to a power than one: about their number where each has a core, 1.5 where two share one."""
    # of what PyTorch does, this keeps a core's arithmetic busiest; a product of matrices is as fast on two threads of one core
    threads, numbers = torch.get_num_threads(), torch.rand(2**17)
    result = torch.empty_like(numbers)

    def raised_by(count: int) -> torch.Tensor:
        torch.set_num_threads(count)
        return torch.pow(numbers, 1.3, out=result)

    try:
        timing = interleaved({"one": lambda: raised_by(1), "all": lambda: raised_by(threads)}, 0.1)
    finally:
        torch.set_num_threads(threads)
    return timing["one"].median / timing["all"].median


def machine() -> str:
    """The device that runs the benchmark, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {capability}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The CPU's name and what it has for numbers of few bits; where the system does not say, its architecture."""
    told = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line) if told.exists() else {}
    fields = {name.strip(): said.strip() for name, said in lines.items()}
    has = [flag for flag in FEW_BITS if flag in fields.get("flags", "").split()]
    return ", ".join([fields.get("model name", platform.machine()), *has])


def versions() -> dict[str, str]:
    """Versions that figures depend on; peers that are not installed are left out."""
    found = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, rows: Sequence[Row], settings: Mapping[str, Any] | None = None) -> None:
    """Write rows with date, machine, versions and the settings of the run."""
    date = datetime.now(UTC).date().isoformat()
    head = {"date": date, "machine": machine(), "versions": versions(), "settings": dict(settings or {})}
    path.write_text(json.dumps({**head, "rows": list(rows)}, indent=1) + "\n")


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Rows of the same keys as a table; None is a dash."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=WIDTH).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value}"
