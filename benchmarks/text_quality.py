"""Quality on long text: SmolLM2-135M on a text that ships with Python (pydoc_data.topics).

At each place a prefix is prefilled once, exactly, and the tokens that follow are scored in one chunk over every cache. Bases are
calibrated on other places of the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from harness import Row
from measure import Measured, Prompt, Trial, by_system, means, prompt_of
from replay import Script, flat, mean
from torch import Tensor, nn

import apack_compile

PLACES = (2_000, 30_000, 45_000)
CALIBRATION_PLACES = (60_000, 75_000, 90_000)
CONTINUATION = 200
CONTINUATION_CHUNK = 32
QUARTERS = 4


@dataclass(frozen=True)
class TextOptions:
    """Tokens before the scored ones, scored tokens, places, and whether a continuation is scored too."""

    prefixes: tuple[int, ...]
    scored: int
    places: tuple[int, ...] = PLACES
    continuation: bool = False


def text_ids(tokenizer: Any) -> Tensor:
    """The text's tokens `[T]`."""
    return torch.tensor(tokenizer("\n".join(topics.values())).input_ids)


def calibrate_on_text(model: nn.Module, ids: Tensor, length: int) -> None:
    """Calibrate on other places of the text, over the positions that are measured."""
    apack_compile.optimize(model, compile="none")
    apack_compile.calibrate(
        model, [{"input_ids": ids[None, start : start + length], "logits_to_keep": 1} for start in CALIBRATION_PLACES]
    )


def text_prompts(model: nn.Module, tokenizer: Any, options: TextOptions) -> Iterator[Prompt]:
    """Prompts, one per prefix length and place; the model is calibrated for each length before its first."""
    ids = text_ids(tokenizer)
    for prefix in options.prefixes:
        calibrate_on_text(model, ids, prefix + options.scored)
        for place in options.places:
            labels = {"tokens": prefix, "place": place}
            prompt = prompt_of(model, Trial(labels, ids[place : place + prefix]))
            following = ids[place + prefix : place + prefix + options.scored]
            scripts = [Script((following,))]
            if options.continuation:
                scripts.append(continuation_script(model, prompt, following[:1]))
            yield prompt.asking(scripts)


def continuation_script(model: nn.Module, prompt: Prompt, first: Tensor) -> Script:
    """The exact cache's greedy continuation, in chunks as small as decode's."""
    (reply,) = prompt.ask(model, [Script((first,), CONTINUATION, stops=False)])
    return Script(torch.cat([first, torch.tensor(reply.new_ids[:-1])]).split(CONTINUATION_CHUNK))


def text_rows(results: Sequence[tuple[Trial, Sequence[Measured]]]) -> list[Row]:
    """One row per system, prefix and place."""
    return [_row(one, trial.labels, [one]) for trial, measured in results for one in measured]


def text_means(results: Sequence[tuple[Trial, Sequence[Measured]]]) -> list[Row]:
    """One row per prefix and system: means over places."""
    lengths = dict.fromkeys(trial.labels["tokens"] for trial, _ in results)
    rows = []
    for length in lengths:
        chosen = [(trial, measured) for trial, measured in results if trial.labels["tokens"] == length]
        for pairs in by_system(chosen).values():
            rows.append(_row(pairs[0][1], {"tokens": length, "places": len(pairs)}, [one for _, one in pairs]))
    return rows


def _row(system: Measured, labels: dict[str, Any], measured: Sequence[Measured]) -> Row:
    shared = means(measured)
    failed = shared["reason"] is not None
    scored = [one.distances[0] for one in measured if not failed]
    return {
        **labels,
        "system": system.family,
        "setting": system.setting,
        "kl": None if failed else mean(flat(part for d in scored for part in d.kl)),
        "top1_equal": None if failed else mean(flat(part for d in scored for part in d.top1_equal)),
        **shared,
        "note": system.note,
    }


def continuation_rows(results: Sequence[tuple[Trial, Sequence[Measured]]]) -> list[Row]:
    """KL over a continuation by quarter, means over places."""
    rows = []
    for length in dict.fromkeys(trial.labels["tokens"] for trial, _ in results):
        chosen = [(trial, measured) for trial, measured in results if trial.labels["tokens"] == length]
        for (family, setting), pairs in by_system(chosen).items():
            shared = means([one for _, one in pairs])
            row: Row = {"tokens": length, "system": family, "setting": setting, "held_ratio": shared["held_ratio"]}
            series = [flat(one.distances[1].kl) for _, one in pairs if shared["reason"] is None]
            for quarter in range(QUARTERS):
                parts = [kl[len(kl) * quarter // QUARTERS : len(kl) * (quarter + 1) // QUARTERS] for kl in series]
                row[f"kl_quarter_{quarter + 1}"] = mean(flat(parts)) if parts else None
            rows.append({**row, "reason": shared["reason"]})
    return rows
