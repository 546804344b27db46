"""What head groups and key blocks cost in quality: the plan's own objective on SmolLM2-135M, text, at a ratio.

The objective is what `budget_plan` minimises: every component's weight (Fisher information of the cached states) times the distortion of
its bits, summed over components, streams and layers. `python benchmarks/harm.py --json PATH`.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import Row, print_table, write_json
from text_quality import CALIBRATION_PLACES, text_ids

from apack_compile.calibration.collect import add_observation, as_packed
from apack_compile.calibration.find_rotation import find_rotation
from apack_compile.calibration.sensitivity import observe
from apack_compile.calibration.streams import Running, by_layer, fitted
from apack_compile.demo.assets import load_model, load_tokenizer
from apack_compile.plan.budget import budget_plan
from apack_compile.plan.plan import STREAMS, Plan
from apack_compile.plan.source import Statistics

KEY_BLOCKS = (32, 64, 128, 256, 0)
PROMPTS, TOKENS = 2, 2_048
PLANNED_TOKENS = 32_768


def harm(plan: Plan, statistics: Statistics) -> float:
    """The plan's objective, summed over layers and streams of text."""
    total = 0.0
    for layer, streams in plan.layers.items():
        for measured, stream in zip(statistics[layer]["text"], (streams.text_key, streams.text_value), strict=True):
            weights = measured.weights.sum(0).double()
            lost = torch.ones_like(weights)
            kept = [band.distortion for band in stream.bands.each]
            lost[: len(kept)] = torch.tensor(kept, dtype=torch.float64)
            total += float((weights * lost).sum())
    return total


def main(
    ratio: Annotated[list[float] | None, typer.Option(help="Dense bytes over packed bytes; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Measure the objective for every key block, with one basis for all heads and one for each."""
    model, ids = load_model(), text_ids(load_tokenizer())
    layers = list(range(model.config.get_text_config().num_hidden_layers))
    heads = model.config.get_text_config().num_key_value_heads
    inputs = [{"input_ids": ids[None, at : at + TOKENS], "logits_to_keep": 1} for at in CALIBRATION_PLACES[:PROMPTS]]
    seen = [observe(model, one, layers) for one in inputs]
    rows: list[Row] = []
    for block in KEY_BLOCKS:
        rotation = find_rotation(model, layers, inputs[0], block)[0]
        for groups in (1, heads):
            running: Running = {}
            for observation, one in zip(seen, inputs, strict=True):
                add_observation(running, as_packed(observation, rotation), model.config, one, groups)
            statistics = by_layer(fitted(running))
            for wanted in ratio or [4.0, 8.0]:
                plan = budget_plan(statistics, wanted, PLANNED_TOKENS, 0.0, rotation=rotation)
                lost = {
                    f"{stream}_error": sum(getattr(p, f"text_{stream}").expected_error for p in plan.layers.values())
                    / len(layers)
                    for stream in STREAMS
                }
                row = {"plan": f"ratio={wanted:g}", "groups": groups, "key_block": block}
                rows.append({**row, "harm": harm(plan, statistics), **lost})
    best = {row["plan"]: row["harm"] for row in rows if (row["groups"], row["key_block"]) == (1, KEY_BLOCKS[0])}
    rows = [{**row, "harm_over_default": row["harm"] / best[row["plan"]]} for row in rows]
    print_table("harm by head groups and key block, SmolLM2-135M", rows)
    if json is not None:
        write_json(json, rows, {"prompts": PROMPTS, "tokens": TOKENS, "planned_tokens": PLANNED_TOKENS})


if __name__ == "__main__":
    typer.run(main)
