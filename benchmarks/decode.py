"""A whole model, dense against packed: prefill, compaction, tokens a second, memory.

On a GPU, Llamas of the four shapes with random weights, few layers (`--layers`) and a small vocabulary, so that a layer weighs as in the
deep model: rows say `layers` and `model_layers`, and their tokens a second are of the shallow model. On a CPU, SmolLM2 and the demo's VLM
with their own weights, float32.

Dense is transformers' StaticCache, compiled with Inductor; packed is the same model compiled through our backend, Inductor below (both
with CUDA graphs on a GPU); with `--compile none` neither is compiled. On a CPU, compiled, there is a second dense way: the StaticCache
through our backend, which shares key heads instead of copying them, and computes linear layers as the packed step does. All take turns,
`STEPS` steps at a time; medians.
Compaction is the time of encoding every layer's keys and values, without the model, as a share of the dense prefill.
`largest_batch`: sequences of this length whose caches fit in `--budget`, at the depth of the shape's model.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from attend import SHAPES
from harness import Row, print_table, write_json
from models import REAL, Packing, Subject, random_subject, real_subject
from torch import Tensor
from transformers import DynamicCache, StaticCache

import apack_compile
from apack_compile.backend.backend import make_backend
from apack_compile.cache.cache import CompactedCache
from apack_compile.models.cache_argument import with_cache
from apack_compile.plan.rotation import BLOCK

STEPS, ROUNDS, WARM_UP_STEPS = 8, 6, 4
QUICK_ROUNDS = 2
PREFILLS = 3
SHARED_HEADS = "shared heads"
GIB = 2**30
# Columns of the printed table, and their titles there.
SHOWN = {
    "shape": "shape",
    "plan": "plan",
    "tokens": "tokens",
    "batch": "batch",
    "layers": "layers",
    "ratio": "ratio",
    "prefill_dense_seconds": "prefill s",
    "compaction_share": "compaction / prefill",
    "dense_tokens_per_second": "dense tok/s",
    "packed_tokens_per_second": "packed tok/s",
    "speedup_vs_dense": "speedup",
    "speedup_vs_shared_heads": "vs shared heads",
    "dense_largest_batch": "dense batch",
    "packed_largest_batch": "packed batch",
}


class Clock:
    """Seconds and, on a GPU, peak bytes of what runs inside."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def __enter__(self) -> "Clock":
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.peak = torch.cuda.max_memory_allocated() if self.on_gpu else None


def prefilled(subject: Subject, cache: Any, device: str) -> tuple[Any, Clock, Tensor]:
    """A cache that the model has read the prompt into, what that took, and the next token `[B, 1]`."""
    with Clock(device) as clock:
        logits = subject.model(
            **with_cache(subject.model, subject.inputs, cache), use_cache=True, logits_to_keep=1
        ).logits
    return cache, clock, logits[:, -1:].argmax(-1)


def dense_cache(subject: Subject) -> DynamicCache:
    """transformers' growing cache."""
    return DynamicCache(config=subject.model.config.get_text_config(decoder=True))


def static_cache(subject: Subject, states: list[tuple[Tensor, Tensor]], room: int) -> StaticCache:
    """A static cache of these keys and values with room for more tokens."""
    tokens = states[0][0].shape[2]
    config = subject.model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=tokens + room)
    position = torch.arange(tokens, device=states[0][0].device)
    for layer, (key, value) in enumerate(states):
        # transformers before 5.20 wants to be told the positions
        cache.update(key, value, layer, {"cache_position": position})
    return cache


def compacted(
    subject: Subject, states: list[tuple[Tensor, Tensor]], room: int, device: str
) -> tuple[CompactedCache, float]:
    """A packed cache of these keys and values, and the seconds that encoding took."""
    cache = apack_compile.new_cache(subject.model, room)
    vision = apack_compile.models.modality.vision_of(subject.model.config, subject.inputs)
    cache.expect(vision, None)
    with Clock(device) as clock:
        for layer, (key, value) in enumerate(states):
            cache.update(key, value, layer)
    return cache, clock.seconds


def stepper(subject: Subject, cache: Any, token: Tensor, compiled: Callable[..., Any]) -> Callable[[], Tensor]:
    """One greedy decode step after the other; each gives the next token `[B, 1]`."""
    held = {"token": token}
    packed = isinstance(cache, CompactedCache)

    def step() -> Tensor:
        if packed:
            # as generate does before each step: room in the cache, a full tail packed anew
            cache.reserve(1)
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(**with_cache(subject.model, {"input_ids": held["token"]}, cache), use_cache=True).logits
        held["token"] = logits[:, -1:].argmax(-1)
        return held["token"]

    return step


def calls_of(subject: Subject, device: str, compiled: bool, record: list[Any]) -> dict[str, Callable[..., Any]]:
    """The model's forward for each cache, compiled or not; `record` gets what our backend did to each graph."""
    if not compiled:
        return {"dense": subject.model, "packed": subject.model}
    mode = "reduce-overhead" if device == "cuda" else None
    forward, ours = subject.model.forward, make_backend(record.append)
    calls = {
        "dense": torch.compile(forward, mode=mode, dynamic=False),
        "packed": torch.compile(forward, backend=ours, mode=mode),
    }
    # on other devices our backend leaves dense attention as it is
    return calls | ({SHARED_HEADS: torch.compile(forward, backend=ours, dynamic=False)} if device == "cpu" else {})


def timed_steps(steps: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of a step in each round; after a warm-up, both kinds take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            with Clock(device) as clock:
                for _ in range(STEPS):
                    step()
            times[name].append(clock.seconds / STEPS)
    return times


def measured(subject: Subject, packing: Packing, device: str, rounds: int, budget: float, compiled: bool = True) -> Row:
    """One row: a model, a prompt, a plan."""
    model, prompt = subject.model, subject.inputs["input_ids"]
    batch, tokens = prompt.shape
    room = WARM_UP_STEPS + STEPS * (rounds + 1)
    subject.prepare()
    warm, packed_times, dense_times = min(PREFILLS, rounds), [], []
    # packed first: the dense states that are kept afterwards are not in its peak
    for _ in range(warm):
        cache, packed_clock, _ = prefilled(subject, apack_compile.new_cache(model, room), device)
        packed_times.append(packed_clock.seconds)
        del cache
    for _ in range(warm):
        cache = None
        cache, dense_clock, token = prefilled(subject, dense_cache(subject), device)
        dense_times.append(dense_clock.seconds)
    states = [(layer.keys, layer.values) for layer in cache.layers]
    del cache
    compactions = []
    for _ in range(warm + 1):
        packed, seconds = compacted(subject, states, room, device)
        compactions.append(seconds)
    graphs: list[Any] = []
    calls = calls_of(subject, device, compiled, graphs)
    caches = {name: packed if name == "packed" else static_cache(subject, states, room) for name in calls}
    dense_bytes = sum(x.numel() * x.element_size() for pair in states for x in pair)
    del states
    held = packed.report()
    steps = {name: stepper(subject, caches[name], token, calls[name]) for name in caches}
    times = timed_steps(steps, rounds, device)
    # from here on only `caches` and `steps` hold the caches, so that their memory can be told
    plan = packed.index.plan
    del packed
    left = [site for graph in graphs for site in graph.left]
    if left:
        raise RuntimeError(f"{subject.name}: {len(left)} attentions were not rewritten ({left[0].reason})")
    depth = subject.layers / subject.built_layers
    per_sequence = {"dense": dense_bytes * depth / batch, "packed": held["sequence_bytes"] * depth / batch}
    compaction, prefill = median(compactions[1:]), median(dense_times)
    row: Row = {
        "shape": subject.name,
        "plan": packing.name,
        "tokens": tokens,
        "batch": batch,
        "key_block": 0 if plan.rotation is None else plan.rotation.block,
        "groups": plan.groups,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compiled": compiled,
        "layers": subject.built_layers,
        "model_layers": subject.layers,
        "ratio": held["ratio"],
        "prefill_dense_seconds": prefill,
        "prefill_packed_seconds": median(packed_times),
        "compaction_seconds": compaction,
        "compaction_share": compaction / prefill,
        "dense_step_ms": 1e3 * median(times["dense"]),
        "packed_step_ms": 1e3 * median(times["packed"]),
        "dense_tokens_per_second": batch / median(times["dense"]),
        "packed_tokens_per_second": batch / median(times["packed"]),
        "speedup_vs_dense": median(times["dense"]) / median(times["packed"]),
        "speedup_of_fastest_rounds": min(times["dense"]) / min(times["packed"]),
        "dense_cache_bytes": dense_bytes,
        "packed_cache_bytes": held["sequence_bytes"],
        "shared_bases_bytes": held["model_bytes"],
        "dense_largest_batch": int(budget * GIB / per_sequence["dense"]),
        "packed_largest_batch": int(max(budget * GIB - held["model_bytes"] * depth, 0) / per_sequence["packed"]),
        "budget_gib": budget,
    }
    if SHARED_HEADS in times:
        row |= {
            "shared_heads_tokens_per_second": batch / median(times[SHARED_HEADS]),
            "speedup_vs_shared_heads": median(times[SHARED_HEADS]) / median(times["packed"]),
        }
    if device == "cuda":
        row |= {"prefill_dense_peak_bytes": dense_clock.peak, "prefill_packed_peak_bytes": packed_clock.peak}
        row |= steady_memory(caches, steps, torch.cuda.memory_allocated)
    return row


def steady_memory(caches: dict[str, Any], steps: dict[str, Any], allocated: Callable[[], int]) -> Row:
    """Bytes that the allocator gets back when a cache goes: what decoding holds besides the weights and the graphs' own memory."""
    found = {}
    for name in list(caches):
        before = allocated()
        del caches[name], steps[name]
        gc.collect()
        found[f"{name}_steady_bytes"] = before - allocated()
    return found


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    shape: Annotated[list[str] | None, typer.Option(help="A shape's or a real model's name; may be repeated.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; may be repeated.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Dense bytes over packed bytes. Default: 8.")] = None,
    preset: Annotated[str | None, typer.Option(help="attentionpack, without tiers, instead of a ratio.")] = None,
    key_block: Annotated[int, typer.Option(help="Slots that share an anchor; 0: keys as they come.")] = BLOCK,
    groups: Annotated[
        int | None, typer.Option(help="Head groups of random weights' plans. Default: as optimize chooses.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of a model with random weights.")] = 4,
    dtype: Annotated[
        str | None, typer.Option(help="Of random weights. Default: bfloat16 on a GPU, else float32.")
    ] = None,
    compile: Annotated[
        str, typer.Option(help="auto, or none: both decode step by step as transformers has it.")
    ] = "auto",
    budget: Annotated[float, typer.Option(help="GiB for caches, for the largest batch.")] = 64.0,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, a shorter prompt.")] = False,
) -> None:
    """Time prefill, compaction and decode of whole models, dense and packed."""
    if preset not in (None, "attentionpack"):
        raise typer.BadParameter(f"preset={preset!r} must be 'attentionpack'")
    if preset is not None and ratio is not None:
        raise typer.BadParameter(f"preset={preset!r} and ratio={ratio!r} exclude each other")
    if compile not in ("auto", "none"):
        raise typer.BadParameter(f"compile={compile!r} must be 'auto' or 'none'")
    names = shape or (list(SHAPES) if device == "cuda" else list(REAL))
    unknown = [name for name in names if name not in (*SHAPES, *REAL)]
    if unknown:
        raise typer.BadParameter(f"shape={unknown[0]!r} is not one of {', '.join((*SHAPES, *REAL))}")
    packing = Packing(None if preset else ratio or 8.0, key_block, groups)
    kind = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    rows = []
    for name in names:
        for length in tokens or ([512] if quick else [2_048] if device == "cpu" else [8_192]):
            for sequences in batch or [1]:
                torch.manual_seed(0)
                torch._dynamo.reset()
                if name in REAL:
                    subject = real_subject(name, length, sequences, packing)
                else:
                    subject = random_subject(name, layers, length, sequences, packing, kind, device)
                rows.append(
                    measured(subject, packing, device, QUICK_ROUNDS if quick else ROUNDS, budget, compile == "auto")
                )
                print(rows[-1], flush=True)
    shown = [{title: row[name] for name, title in SHOWN.items() if name in row} for row in rows]
    print_table(f"decode, {device}; largest batch in {budget:g} GiB of caches", shown)
    if json is not None:
        write_json(json, rows, {"steps": STEPS, "rounds": QUICK_ROUNDS if quick else ROUNDS})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
