"""Quality on pictures: the demo's model, pictures read into a cache first, each question asked from a copy of it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness import Row
from measure import Measured, Prompt, Trial, by_system, means, prompt_of
from replay import Script, flat, mean
from torch import Tensor, nn

import apack_compile
from apack_compile.demo.assets import Question, load_questions
from apack_compile.demo.evaluate import ANSWER_TOKENS, calibration_inputs
from apack_compile.demo.prompts import ASSISTANT, END, USER, build_prompt, load_pixels, question_text, read_answer
from apack_compile.models.modality import vision_of

SEED = 0
TURN_PICTURES = 4
TURNS = 8


def calibrate_on_pictures(model: nn.Module, tokenizer: Any, images: int) -> None:
    """Calibrate as the demo does."""
    apack_compile.optimize(model, compile="none")
    apack_compile.calibrate(model, calibration_inputs(tokenizer, load_questions("train", SEED), images))


def picture_prompt(model: nn.Module, prefix: Tensor, pictures: Sequence[Question], labels: dict[str, Any]) -> Prompt:
    """A prefilled prompt that ends behind its last picture."""
    inputs = {"pixel_values": load_pixels(pictures)}
    vision = vision_of(model.config, {"input_ids": prefix})
    return prompt_of(model, Trial(labels, prefix[0], inputs=inputs, vision=vision))


def vision_prompts(model: nn.Module, tokenizer: Any, sizes: Sequence[int], questions: int) -> Iterator[Prompt]:
    """Prompts with one question per picture; the model is calibrated for each number of pictures before its first."""
    groups = load_questions("test", SEED)
    for images in sizes:
        calibrate_on_pictures(model, tokenizer, images)
        for start in range(0, questions, images):
            pictures = [group[0] for group in groups[start : start + images]]
            prompts = [build_prompt(tokenizer, picture.text, i, images) for i, picture in enumerate(pictures)]
            labels = {"pictures": images, "answers": [picture.answer for picture in pictures]}
            prompt = picture_prompt(model, prompts[0].prefix, pictures, labels)
            yield prompt.asking([Script((p.input_ids[0, p.prefix_len :],), ANSWER_TOKENS) for p in prompts])


def turn_prompts(model: nn.Module, tokenizer: Any, conversations: int) -> Iterator[Prompt]:
    """Conversations about four pictures; each turn is a question and the exact cache's answer, both given."""
    groups = load_questions("test", SEED)
    calibrate_on_pictures(model, tokenizer, TURN_PICTURES)
    for start in range(0, conversations * TURN_PICTURES, TURN_PICTURES):
        chosen = groups[start : start + TURN_PICTURES]
        asked = [(turn % TURN_PICTURES, chosen[turn % TURN_PICTURES][turn // TURN_PICTURES]) for turn in range(TURNS)]
        first = build_prompt(tokenizer, asked[0][1].text, 0, TURN_PICTURES)
        prompt = picture_prompt(model, first.prefix, [group[0] for group in chosen], {"turns": TURNS})
        chunks = [first.input_ids[0, first.prefix_len :]]
        end = tokenizer.convert_tokens_to_ids(END)
        for turn in range(TURNS):
            (reply,) = prompt.ask(model, [Script(tuple(chunks), ANSWER_TOKENS)])
            answer = [*(token for token in reply.new_ids if token != end), end]
            chunks[-1] = torch.cat([chunks[-1], torch.tensor(answer)])
            if turn + 1 < TURNS:
                picture, question = asked[turn + 1]
                text = f"\n{USER}{question_text(question.text, picture, TURN_PICTURES)}{ASSISTANT}"
                chunks.append(torch.tensor(tokenizer(text, add_special_tokens=False).input_ids))
        yield prompt.asking([Script(tuple(chunks))])


def vision_rows(tokenizer: Any, results: Sequence[tuple[Trial, Sequence[Measured]]], by_position: bool) -> list[Row]:
    """One row per number of pictures and system; or, of prompts with several pictures, one per position asked about."""
    rows = []
    for images in dict.fromkeys(trial.labels["pictures"] for trial, _ in results):
        if by_position and images == 1:
            continue
        chosen = [(trial, measured) for trial, measured in results if trial.labels["pictures"] == images]
        exact = {id(trial): _answers(tokenizer, measured[0]) for trial, measured in chosen}
        for (family, setting), pairs in by_system(chosen).items():
            shared = means([one for _, one in pairs])
            for positions in [[j] for j in range(images)] if by_position else [range(images)]:
                labels: Row = {"pictures": images, **({"asked_about": positions[0] + 1} if by_position else {})}
                figures = _figures(tokenizer, exact, pairs, positions, shared["reason"] is not None)
                row = {**labels, "system": family, "setting": setting, **figures, **shared}
                rows.append({**row, "note": pairs[0][1].note})
    return rows


def _figures(
    tokenizer: Any,
    exact: dict[int, list[str]],
    pairs: Sequence[tuple[Trial, Measured]],
    positions: Sequence[int],
    failed: bool,
) -> Row:
    """Means over the questions about the pictures at some positions."""
    if failed:
        return dict.fromkeys(("kl", "accuracy", "answers_equal", "questions"))
    kl, right, equal = [], [], []
    for trial, one in pairs:
        said = _answers(tokenizer, one)
        for j in positions:
            if j < len(said):
                kl += flat(one.distances[j].kl)
                right.append(said[j] == trial.labels["answers"][j])
                equal.append(said[j] == exact[id(trial)][j])
    return {"kl": mean(kl), "accuracy": mean(right), "answers_equal": mean(equal), "questions": len(right)}


def _answers(tokenizer: Any, measured: Measured) -> list[str]:
    """What was answered to each question."""
    return [read_answer(tokenizer.decode(d.new_ids, skip_special_tokens=True)) for d in measured.distances]


def turn_rows(results: Sequence[tuple[Trial, Sequence[Measured]]]) -> list[Row]:
    """KL of each turn's tokens, means over conversations."""
    rows = []
    for (family, setting), pairs in by_system(results).items():
        shared = means([one for _, one in pairs])
        row: Row = {"system": family, "setting": setting, "held_ratio": shared["held_ratio"]}
        series = [one.distances[0].kl for _, one in pairs if shared["reason"] is None]
        for turn in range(TURNS):
            row[f"kl_turn_{turn + 1}"] = mean(flat(kl[turn] for kl in series)) if series else None
        rows.append({**row, "reason": shared["reason"]})
    return rows
