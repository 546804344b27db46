"""KL with bases of `calibrate`, of a first request of its own prompt, and of a first request of another one."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import Row
from measure import Prompt, measure
from replay import flat, mean
from systems import System, own_report, packed
from text_quality import TextOptions, text_prompts
from torch import nn
from vision_quality import vision_prompts

import apack_compile
from apack_compile.demo.assets import load_model, load_tokenizer
from apack_compile.models.cache_argument import with_cache

RATIOS = (4.0, 8.0)
TOKENS, SCORED = 2_048, 192
PICTURES, QUESTIONS = 4, 16


@torch.no_grad()
def quality_rows() -> list[Row]:
    """One row for each kind of prompt and ratio."""
    model, tokenizer = load_model(), load_tokenizer()
    benches = {
        "text": lambda: text_prompts(model, tokenizer, TextOptions((TOKENS,), SCORED)),
        f"{PICTURES} pictures": lambda: vision_prompts(model, tokenizer, [PICTURES], QUESTIONS),
    }
    return [row for name, prompts in benches.items() for row in rows_of(name, model, list(prompts()))]


def rows_of(name: str, model: nn.Module, prompts: Sequence[Prompt]) -> list[Row]:
    """Means over prompts; the model is calibrated for them."""
    references = [prompt.ask(model, prompt.trial.scripts) for prompt in prompts]
    rows = []
    for ratio in RATIOS:
        found: dict[str, list[float]] = {"calibrate": [], "first_request": [], "after_another": []}
        for i, (prompt, replies) in enumerate(zip(prompts, references, strict=True)):
            other = prompts[i - 1].trial
            systems = {
                "calibrate": packed("", "", True, ratio=ratio),
                "first_request": first_request(ratio, None),
                "after_another": first_request(ratio, lambda fresh, other=other: read_first(fresh, other)),
            }
            # first the one that keeps the model's calibration
            for way, system in systems.items():
                asked = model if way == "calibrate" else copy.deepcopy(model)
                (one,) = measure(asked, prompt, replies, [system])
                if one.reason is not None:
                    raise RuntimeError(f"{name}, ratio {ratio:g}, {way}: {one.reason}")
                found[way] += flat(part for distance in one.distances for part in distance.kl)
        kl = {way: mean(values) for way, values in found.items()}
        over = {f"{way}_over_calibrate": kl[way] / kl["calibrate"] for way in ("first_request", "after_another")}
        rows.append({"prompts": name, "ratio": ratio, **{f"kl_{way}": x for way, x in kl.items()}, **over})
    return rows


def first_request(ratio: float, before: Callable[[nn.Module], None] | None) -> System:
    """A cache of a model that nothing was calibrated for; before: what it does first."""

    def make(model: nn.Module) -> Any:
        apack_compile.restore(model)
        apack_compile.optimize(model, ratio=ratio, compile="none", min_tokens=0)
        if before is not None:
            before(model)
        return apack_compile.new_cache(model, 8)

    return System("", "", make, own_report, reads_prompt=True)


def read_first(model: nn.Module, trial: Any) -> None:
    """A first request of another prompt."""
    inputs = {"input_ids": trial.ids[None], **(trial.inputs or {}), "logits_to_keep": 1}
    model(**with_cache(model, inputs, apack_compile.new_cache(model, 8)))
