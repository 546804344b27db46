"""Tokens a second at equal bytes: as many requests as a byte budget holds, with a dense cache and with a packed one; and at an equal batch.

The budget is what a dense cache of `--dense-batch` requests takes in 16 bits a number, also where the model computes in float32: that
is in the dense cache's favour. A packed cache is charged everything that it holds, and the bases. Dense is three ways to decode, of
which the fastest counts: transformers' DynamicCache without a compiler, its StaticCache compiled by Inductor, and that compiled through
our backend, which shares heads instead of copying them and computes linear layers as the packed steps do, which are compiled through it
too.
Where a model is measured in two dtypes, dense is the faster one: a packed cache in bfloat16 gains nothing from dense attention that is
slow in it.

All take turns in one run, `STEPS` steps at a time; medians. Rows of a batch hold the same prompt: time does not depend on what they say.
"""

import copy
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from decode import ROUNDS, STEPS, compacted, dense_cache, prefilled, static_cache, stepper, timed_steps
from harness import Row, print_table, processor, write_json
from models import REAL, TOKENS_A_PICTURE, Packing, Subject, real_subject
from torch import Tensor
from transformers import DynamicCache

import apack_compile
from apack_compile.backend.backend import make_backend
from apack_compile.cache.accounting import DENSE_ELEMENT_BYTES, storage_bytes, tensors_in
from apack_compile.cache.cache import CompactedCache
from apack_compile.calibration.host_memory import give_back
from apack_compile.generate.session import DEFAULT_NEW_TOKENS
from apack_compile.models.modality import vision_of
from apack_compile.plan.rotation import BLOCK

EAGER, INDUCTOR, SHARED_HEADS = "DynamicCache, eager", "StaticCache, Inductor", "StaticCache, our backend, lossless"
DENSE = (EAGER, INDUCTOR, SHARED_HEADS)
PACKED, PACKED_EQUAL = "packed, equal bytes", "packed, equal batch"
PICTURES = 16
LENGTHS = {REAL[0]: 2_048, REAL[1]: PICTURES * TOKENS_A_PICTURE}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Columns of the printed table, and their titles there.
SHOWN = {
    "shape": "model",
    "dtype": "dtype",
    "tokens": "tokens",
    "plan": "plan",
    "best_dense_of_all": "best dense",
    "dense_batch": "dense batch",
    "packed_batch": "packed batch",
    "dense_tokens_per_second": "dense tok/s",
    "packed_tokens_per_second": "packed tok/s",
    "throughput_at_equal_bytes": "at equal bytes",
    "throughput_at_equal_batch": "at equal batch",
}


@dataclass(frozen=True)
class Contender:
    """A way to decode: a model's forward over a cache of so many requests."""

    batch: int
    cache: Any
    call: Callable[..., Any]
    step: Callable[[], Tensor]

    @property
    def held(self) -> int:
        """Bytes that the cache holds, bases included."""
        if isinstance(self.cache, CompactedCache):
            held = self.cache.report()
            return held["sequence_bytes"] + held["model_bytes"]
        return storage_bytes(tensors_in([list(vars(layer).values()) for layer in self.cache.layers]))


def rows_of(states: list[tuple[Tensor, Tensor]], batch: int) -> list[tuple[Tensor, Tensor]]:
    """The states of a request as those of a batch."""
    return [(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)) for key, value in states]


def dynamic_cache(subject: Subject, states: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """transformers' growing cache of these keys and values."""
    cache = dense_cache(subject)
    for layer, (key, value) in enumerate(states):
        cache.update(key, value, layer)
    return cache


def contenders(
    plain: Subject,
    subject: Subject,
    states: list[tuple[Tensor, Tensor]],
    token: Tensor,
    batches: tuple[int, int],
    inner: str,
) -> dict[str, Contender]:
    """Every way to decode; `batches`: requests in the dense caches and in the packed one. plain: the model without `optimize`."""
    dense_batch, packed_batch = batches
    room, graphs = DEFAULT_NEW_TOKENS, []
    stock = {"dynamic": False, "backend": inner}
    ours = {"dynamic": False, "backend": make_backend(graphs.append, inner=inner)}
    forward = plain.model.forward
    calls = {EAGER: forward, INDUCTOR: torch.compile(forward, **stock), SHARED_HEADS: torch.compile(forward, **ours)}
    found = {}
    for name, call in calls.items():
        held = rows_of(states, dense_batch)
        cache = dynamic_cache(plain, held) if name == EAGER else static_cache(plain, held, room)
        found[name] = Contender(dense_batch, cache, call, stepper(plain, cache, token.expand(dense_batch, 1), call))
    packed = torch.compile(subject.model.forward, **ours)
    for name, batch in ((PACKED_EQUAL, dense_batch), (PACKED, packed_batch)):
        here = replace(subject, inputs={"input_ids": subject.inputs["input_ids"].expand(batch, -1)})
        cache, _ = compacted(here, rows_of(states, batch), room, "cpu")
        found[name] = Contender(batch, cache, packed, stepper(subject, cache, token.expand(batch, 1), packed))
    return found


def resident(name: str) -> int | None:
    """Bytes of this process in memory now (VmRSS), or at most so far (VmHWM); None where the system does not say."""
    if not STATUS.exists():
        return None
    return int(re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1]) * 1024


def memory_of(ways: dict[str, Contender]) -> dict[str, Row]:
    """Bytes that the process has for each way to decode alone: between steps, and at most during them. Empties `ways`."""
    found: dict[str, Row] = {}
    # compiled code goes with the last one that knows it, and is no part of a cache
    calls = [way.call for way in ways.values()]
    for name in list(ways):
        gc.collect()
        give_back()
        if STATUS.exists():
            # forgets the highest so far
            CLEAR.write_text("5")
        for _ in range(STEPS):
            ways[name].step()
        during, after = resident("VmHWM"), resident("VmRSS")
        del ways[name]
        gc.collect()
        give_back()
        before = resident("VmRSS")
        known = before is not None
        found[name] = {
            "resident_bytes": after - before if known else None,
            "peak_resident_bytes": max(during, after) - before if known else None,
        }
    calls.clear()
    return found


def measured(subject: Subject, packing: Packing, dense_batch: int, rounds: int, inner: str = "inductor") -> Row:
    """One row: a model, a prompt, a plan."""
    plain = replace(subject, model=copy.deepcopy(subject.model))
    subject.prepare()
    cache, _, token = prefilled(plain, dense_cache(plain), "cpu")
    states = [(layer.keys, layer.values) for layer in cache.layers]
    del cache
    tokens = states[0][0].shape[2]
    vision = vision_of(plain.model.config, plain.inputs)
    share = 0.0 if vision is None else float(vision.float().mean())
    request = sum(x.numel() for pair in states for x in pair) * DENSE_ELEMENT_BYTES
    budget = dense_batch * request
    packed_batch = apack_compile.largest_batch(subject.model, tokens, budget, share)
    if packed_batch == 0:
        raise ValueError(f"{subject.name}: not one packed request fits in {budget:,} bytes")
    ways = contenders(plain, subject, states, token, (dense_batch, packed_batch), inner)
    del states
    held = {name: way.held for name, way in ways.items()}
    if held[PACKED] > budget:
        raise RuntimeError(
            f"{subject.name}: the packed cache holds {held[PACKED]:,} bytes, and the budget is {budget:,}"
        )
    ratio, batches = ways[PACKED].cache.report()["ratio"], {name: way.batch for name, way in ways.items()}
    times = timed_steps({name: way.step for name, way in ways.items()}, rounds, "cpu")
    memory = memory_of(ways)
    seconds = {name: median(found) for name, found in times.items()}
    speeds = {name: batches[name] / seconds[name] for name in seconds}
    best = max(DENSE, key=lambda name: speeds[name])
    each = {
        name: {
            "batch": batches[name],
            "step_ms": 1e3 * seconds[name],
            "tokens_per_second": speeds[name],
            "held_bytes": held[name],
            **memory[name],
        }
        for name in seconds
    }
    return {
        "shape": subject.name,
        "plan": packing.name,
        "tokens": tokens,
        "vision_share": share,
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "budget_bytes": budget,
        "ratio": ratio,
        "best_dense": best,
        "dense_batch": dense_batch,
        "packed_batch": packed_batch,
        "packed_tokens_per_second": speeds[PACKED],
        "ways": each,
    }


def against_the_best(rows: list[Row]) -> None:
    """Compare each row with the fastest dense way of all rows for the same model, prompt and plan, whatever their dtype."""
    for row in rows:
        same = [other for other in rows if all(other[name] == row[name] for name in ("shape", "tokens", "plan"))]
        best = max(same, key=lambda other: other["ways"][other["best_dense"]]["tokens_per_second"])
        dense = best["ways"][best["best_dense"]]["tokens_per_second"]
        ways = row["ways"]
        row |= {
            "best_dense_of_all": f"{best['best_dense']}, {best['dtype']}",
            "dense_tokens_per_second": dense,
            "throughput_at_equal_bytes": ways[PACKED]["tokens_per_second"] / dense,
            "throughput_at_equal_batch": ways[PACKED_EQUAL]["tokens_per_second"] / dense,
        }


def main(
    model: Annotated[list[str] | None, typer.Option(help="A real model's name; may be repeated.")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="May be repeated. Default: 4, 8, and attentionpack.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt. Default: 2,048, or 16 pictures.")] = None,
    dense_batch: Annotated[int, typer.Option(help="Requests whose dense cache is the budget.")] = 4,
    dtype: Annotated[list[str] | None, typer.Option(help="Of the model; may be repeated. Default: both.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
) -> None:
    """Time decoding at equal bytes and at an equal batch, on a CPU."""
    unknown = [name for name in model or () if name not in REAL]
    if unknown:
        raise typer.BadParameter(f"model={unknown[0]!r} is not one of {', '.join(REAL)}")
    if dense_batch < 1:
        raise typer.BadParameter(f"dense-batch={dense_batch} must be at least 1")
    packings = [Packing(wanted, BLOCK) for wanted in ratio or (4.0, 8.0, None)]
    rounds, rows = 2 if quick else ROUNDS, []
    for kind in dtype or ("float32", "bfloat16"):
        for name in model or REAL:
            for packing in packings:
                torch.manual_seed(0)
                torch._dynamo.reset()
                subject = real_subject(name, tokens or LENGTHS[name], 1, packing, getattr(torch, kind))
                rows.append(measured(subject, packing, dense_batch, rounds))
                against_the_best(rows)
                print(rows[-1], flush=True)
                if json is not None:
                    write_json(json, rows, {"processor": processor(), "steps": STEPS, "rounds": rounds})
    print_table("throughput, cpu", [{title: row[name] for name, title in SHOWN.items()} for row in rows])


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
