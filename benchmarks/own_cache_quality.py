"""What own_cache costs a real model: SmolLM2-135M with transformers' StaticCache, dense against packed, on text.

`bases`: of the prompt itself, in the buffers, or of a plan that `optimize` calibrated on other places of the text. KL in nats a token and
share of equal most likely tokens, over `scored` tokens that are given one at a time after the prompt.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from harness import Row, print_table, write_json
from text_quality import calibrate_on_text, text_ids
from torch import Tensor
from transformers import StaticCache

import apack_compile
from apack_compile.demo.assets import load_model, load_tokenizer
from apack_compile.models.cache_argument import with_cache

PLACE = 5_000


def scored(model: Any, step: Callable[..., Any], ids: Tensor, prompt: int) -> Tensor:
    """Log-probabilities `[scored, vocabulary]` after each token that follows the prompt."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=ids.shape[1])
    model(**with_cache(model, {"input_ids": ids[:, :prompt]}, cache), logits_to_keep=1)
    found = []
    for token in ids[:, prompt:].split(1, dim=1):
        token = token.clone(memory_format=torch.contiguous_format)
        found.append(step(**with_cache(model, {"input_ids": token}, cache)).logits[:, -1].float().log_softmax(-1))
    return torch.cat(found)


def measured(model: Any, ids: Tensor, prompt: int, expected: Tensor, bases: str, ratio: float, chosen: Row) -> Row:
    """One row: where the bases come from, a ratio."""
    torch._dynamo.reset()
    log = apack_compile.GraphLog()
    options = {"own_cache": True, "inner": "eager", "strict": True, "log": log, **chosen}
    found = scored(model, torch.compile(model.forward, backend="attentionpack", options=options), ids, prompt)
    return {
        "bases": bases,
        "ratio": ratio,
        "held_ratio": apack_compile.report(log).bytes["ratio"],
        "kl": float((expected.exp() * (expected - found)).sum(-1).mean()),
        "top1": float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
    }


def main(
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 1_024,
    scored_tokens: Annotated[int, typer.Option("--scored", help="Tokens after it.")] = 48,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Score text through packed static buffers."""
    torch.manual_seed(0)
    model, text = load_model(), text_ids(load_tokenizer())
    ids = text[None, PLACE : PLACE + prompt + scored_tokens]
    expected = scored(model, model, ids, prompt)
    rows = [measured(model, ids, prompt, expected, "prompt", ratio, {"ratio": ratio}) for ratio in (4.0, 8.0)]
    with torch.enable_grad():
        calibrate_on_text(model, text, prompt)
    with TemporaryDirectory() as folder:
        plans = {ratio: f"{folder}/plan-{ratio:g}" for ratio in (4.0, 8.0)}
        for ratio, path in plans.items():
            apack_compile.optimize(model, ratio=ratio, compile="none")
            apack_compile.plan_for(model, ids.shape[1]).save(path)
        apack_compile.restore(model)
        for ratio, path in plans.items():
            rows.append(measured(model, ids, prompt, expected, "calibrated plan", ratio, {"plan": path}))
    print_table("own_cache, SmolLM2-135M", rows)
    if json is not None:
        write_json(json, rows, {"prompt": prompt, "scored": scored_tokens, "place": PLACE})


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
