"""How often importance must be refreshed: KL of the published presets over a continuation, by the steps between two refreshes.

`python benchmarks/refresh.py`: the dense model's greedy continuation of an answer about one of 4 pictures, fed token by token.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import Row, print_table, write_json
from measure import Measured, measure
from replay import Script, flat, mean
from systems import System, packed
from vision_quality import vision_prompts

from apack_compile import AttentionPackOptions, AVLOptions
from apack_compile.config import AttentionPackConfig
from apack_compile.demo.assets import load_model, load_tokenizer

STEPS_BETWEEN = (1, 4, 16, 64)
PICTURES, RANK = 4, 48


def systems() -> list[System]:
    """Each preset at each number of steps."""
    ranks = dict.fromkeys(AttentionPackConfig().ranks, RANK)
    found = []
    for steps in STEPS_BETWEEN:
        options = AttentionPackOptions(refresh_every=steps)
        found.append(
            packed("AttentionPack", str(steps), True, preset="attentionpack", ranks=ranks, attentionpack=options)
        )
    for steps in STEPS_BETWEEN:
        found.append(packed("A-VL", str(steps), True, preset="a-vl", a_vl=AVLOptions(core_every=steps)))
    return found


def rows_of(results: list[list[Measured]]) -> list[Row]:
    """One row per system: KL of the tokens after the question, mean over prompts."""
    rows = []
    for same in zip(*results, strict=True):
        reason = next((one.reason for one in same if one.reason is not None), None)
        kl = None if reason else mean(flat(chunk for one in same for chunk in one.distances[0].kl[1:]))
        rows.append({"system": same[0].family, "steps_between": int(same[0].setting), "kl": kl, "reason": reason})
    return rows


def main(
    questions: Annotated[int, typer.Option(help="Questions, four to a prompt.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 64,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Measure the presets at several steps between refreshes."""
    model, tokenizer = load_model(), load_tokenizer()
    results = []
    for prompt in vision_prompts(model, tokenizer, (PICTURES,), questions):
        question = prompt.trial.scripts[0].chunks
        (reply,) = prompt.ask(model, [Script(question, tokens, stops=False)])
        following = tuple(torch.tensor([token]) for token in reply.new_ids[:-1])
        asked = prompt.asking([Script((*question, *following))])
        results.append(measure(model, asked, asked.ask(model, asked.trial.scripts), systems()))
    rows = rows_of(results)
    print_table("KL over a continuation, by steps between refreshes", rows)
    if json is not None:
        write_json(json, rows, {"pictures": PICTURES, "questions": questions, "tokens": tokens, "rank": RANK})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
