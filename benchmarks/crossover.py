"""From which length on a packed cache decodes as fast as a dense one: the default of `min_tokens`.

`python benchmarks/crossover.py`: SmolLM2 with its own weights, compiled, one decode step at each length: transformers' StaticCache with
Inductor in turns with packed caches of each ratio. A row is a length and a ratio. The crossing is the shortest length from which on no
length is slower than `--least` times dense. `--layers` keeps the leading layers alone, where time is short: `packed_more_us_a_layer` is
then what to look at.
"""

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from decode import STEPS, WARM_UP_STEPS, calls_of, compacted, dense_cache, prefilled, static_cache, stepper, timed_steps
from harness import Row, print_table, write_json
from models import REAL, Packing, Subject, real_subject
from torch import nn

import apack_compile
from apack_compile.plan.rotation import BLOCK

LENGTHS, RATIOS = (64, 128, 256, 512, 1_024, 2_048), (4.0, 8.0)
# Fewer do not tell coarse tokens from fine ones.
CALIBRATION_TOKENS = 1_024


def measured(subject: Subject, tokens: int, ratios: list[float], rounds: int) -> list[Row]:
    """Rows of one length: steps of the dense cache and of each packed one take turns."""
    subject = replace(subject, inputs={name: x[:, :tokens] for name, x in subject.inputs.items()})
    cache, _, token = prefilled(subject, dense_cache(subject), "cpu")
    states = [(layer.keys, layer.values) for layer in cache.layers]
    room = WARM_UP_STEPS + STEPS * (rounds + 1)
    steps = {
        "dense": stepper(
            subject, static_cache(subject, states, room), token, calls_of(subject, "cpu", True, [])["dense"]
        )
    }
    held = {}
    for ratio in ratios:
        # keeps what was calibrated
        apack_compile.optimize(subject.model, ratio=ratio, compile="none")
        packed, _ = compacted(subject, states, room, "cpu")
        steps[ratio] = stepper(subject, packed, token, calls_of(subject, "cpu", True, [])["packed"])
        held[ratio] = packed.report()["ratio"]
    times = timed_steps(steps, rounds, "cpu")
    layers = subject.built_layers
    return [
        {
            "tokens": tokens,
            "plan": f"ratio={ratio:g}",
            "layers": layers,
            "ratio": held[ratio],
            "dense_step_ms": 1e3 * median(times["dense"]),
            "packed_step_ms": 1e3 * median(times[ratio]),
            "speedup_vs_dense": median(times["dense"]) / median(times[ratio]),
            "speedup_of_fastest_rounds": min(times["dense"]) / min(times[ratio]),
            "packed_more_us_a_layer": 1e6 * (min(times[ratio]) - min(times["dense"])) / layers,
        }
        for ratio in ratios
    ]


def keep_leading_layers(model: nn.Module, count: int) -> None:
    """Take away a language model's later layers."""
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:count]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def crossing(rows: list[Row], least: float) -> int | None:
    """The shortest length from which on no row is slower than `least` times dense; None where the longest is."""
    found = None
    for tokens in sorted({row["tokens"] for row in rows}, reverse=True):
        if min(row["speedup_of_fastest_rounds"] for row in rows if row["tokens"] == tokens) < least:
            break
        found = tokens
    return found


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt; may be repeated.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Dense bytes over packed bytes; may be repeated.")] = None,
    least: Annotated[float, typer.Option(help="Speed against dense that counts as no slower.")] = 0.95,
    layers: Annotated[int | None, typer.Option(help="Leading layers of the model. Default: all.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of steps, in turns.")] = 12,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Time decode steps of whole models over short prompts, dense and packed."""
    longest = max(*(tokens or LENGTHS), CALIBRATION_TOKENS)
    subject = real_subject(REAL[0], longest, 1, Packing(RATIOS[0], BLOCK))
    if layers is not None:
        keep_leading_layers(subject.model, layers)
    subject.prepare()
    rows: list[Row] = []
    for length in tokens or LENGTHS:
        torch.manual_seed(0)
        torch._dynamo.reset()
        rows += measured(subject, length, ratio or list(RATIOS), rounds)
        print(*rows[-len(ratio or RATIOS) :], sep="\n", flush=True)
        if json is not None:
            write_json(
                json, rows, {"steps": STEPS, "rounds": rounds, "least": least, "crossing": crossing(rows, least)}
            )
    print_table(f"decode steps, CPU; crossing at {least:g} of the dense speed: {crossing(rows, least)}", rows)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
