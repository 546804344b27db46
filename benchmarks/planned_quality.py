"""What plans that are made for a GPU lose: KL of SmolLM2-135M on text, measured on a CPU, over that of the plans for a CPU.

Plans for a GPU have aligned tokens, and the head groups and blocks of slots that the time model chooses there; where speed is preferred,
whole tiles in all bands but the last.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness import Row, print_table, write_json
from measure import Prompt, Trial, measure, prompt_of
from replay import Script, flat, mean
from systems import System, own_report
from text_quality import CALIBRATION_PLACES, text_ids
from torch import Tensor, nn

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.demo.assets import load_model, load_tokenizer

TOKENS, SCORED = 2_048, 192
# Many: KL at one place differs from that at another by more than plans do.
PLACES = range(2_000, 58_000, 8_000)
SYSTEM = System("", "", lambda model: apack_compile.new_cache(model, 8), own_report)


def prompts_of(model: nn.Module, ids: Tensor) -> list[Prompt]:
    """A prompt for each place of the text, asked for the tokens that follow."""
    prompts = []
    for place in PLACES:
        following = ids[place + TOKENS : place + TOKENS + SCORED]
        prompts.append(
            prompt_of(model, Trial({"place": place}, ids[place : place + TOKENS])).asking([Script((following,))])
        )
    return prompts


def kl_of(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], references: Sequence[Any], options: dict[str, Any]
) -> Row:
    """Mean KL of the model optimized and calibrated with these options, and what was chosen."""
    ids = text_ids(tokenizer)
    apack_compile.restore(model)
    apack_compile.optimize(model, AttentionPackConfig(compile="none", min_tokens=0, **options))
    length = TOKENS + SCORED
    apack_compile.calibrate(
        model, [{"input_ids": ids[None, start : start + length], "logits_to_keep": 1} for start in CALIBRATION_PLACES]
    )
    plan = apack_compile.plan_for(model, TOKENS)
    found, ratios = [], []
    for prompt, replies in zip(prompts, references, strict=True):
        (one,) = measure(model, prompt, replies, [SYSTEM])
        if one.reason is not None:
            raise RuntimeError(one.reason)
        found += flat(part for distance in one.distances for part in distance.kl)
        ratios.append(one.held.ratio)
    block = 0 if plan.rotation is None else plan.rotation.block
    return {**options, "chosen_groups": plan.groups, "chosen_block": block, "held": mean(ratios), "kl": mean(found)}


def main(
    ratio: Annotated[list[float], typer.Option(help="Dense bytes over packed bytes; may be repeated.")] = [8.0, 4.0],  # noqa: B006
    key_block: Annotated[list[int], typer.Option(help="Blocks of slots besides the chosen one.")] = [],  # noqa: B006
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Measure what plans for a GPU lose."""
    model, tokenizer = load_model(), load_tokenizer()
    with torch.no_grad():
        prompts = prompts_of(model, text_ids(tokenizer))
        references = [prompt.ask(model, prompt.trial.scripts) for prompt in prompts]
        rows = []
        for each in ratio:
            asked = [{"planned_device": device} for device in ("cpu", "cuda")]
            asked += [{"planned_device": "cuda", "prefer": "speed"}]
            asked += [{"planned_device": "cuda", "key_block": block} for block in key_block]
            own = [kl_of(model, tokenizer, prompts, references, {"ratio": each, **options}) for options in asked]
            rows += [{**row, "over_cpu": row["kl"] / own[0]["kl"]} for row in own]
            print_table(f"ratio {each:g}", [{"prefer": None, "key_block": None, **row} for row in rows])
    if json is not None:
        write_json(json, rows, {"tokens": TOKENS, "scored": SCORED})


if __name__ == "__main__":
    typer.run(main)
