"""Asks the demo's questions from a dense and from a packed cache, and times both.

The pictures are read into a cache first and each question is asked from that cache: were a question part of the
prefill, its answer would come from exact keys and values and say nothing about the packed ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from apack_compile.demo.assets import Question
from apack_compile.demo.prompts import Prompt, build_dialogue, build_prompt, load_pixels, read_answer
from apack_compile.models.cache_argument import with_cache

ANSWER_TOKENS = 6
TIMED_TOKENS = 16
CALIBRATION_TOKENS = 12_288
CALIBRATION_PROMPTS = 4


@dataclass(frozen=True)
class QuestionSet:
    """Pictures that share one prompt, and the questions about them (question i is about picture i)."""

    pictures: tuple[Question, ...]
    asked: int


@dataclass
class Row:
    """One question with both answers, and whether all that was generated is the same."""

    question: Question
    shown: str
    dense: str
    packed: str
    same_text: bool


@dataclass
class Results:
    """All rows and the caches' bytes, one report per question."""

    rows: list[Row] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)


def question_sets(pictures: Sequence[Sequence[Question]], questions: int, images: int) -> list[QuestionSet]:
    """Cuts shuffled pictures into prompts of `images`, one question per picture, `questions` in all."""
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    if images < 1:
        raise ValueError(f"images-per-prompt must be at least 1, got {images}")
    needed = -(-questions // images) * images
    if needed > len(pictures):
        raise ValueError(f"questions must be at most {len(pictures) // images * images} here, got {questions}")
    sets = []
    for start in range(0, needed, images):
        chosen = tuple(group[0] for group in pictures[start : start + images])
        sets.append(QuestionSet(chosen, min(images, questions - start)))
    return sets


def calibration_inputs(tokenizer: Any, pictures: Sequence[Sequence[Question]], images: int) -> list[dict[str, Any]]:
    """Conversations about training pictures, about 12,000 tokens; short prompts are mixed with longer ones."""
    sizes = [images] if images > 1 else [1, 2, 4, 8]
    inputs: list[dict[str, Any]] = []
    start = tokens = 0
    while tokens < CALIBRATION_TOKENS or len(inputs) < CALIBRATION_PROMPTS:
        size = sizes[len(inputs) % len(sizes)]
        turns = [group[0] for group in pictures[start : start + size]]
        if len(turns) < size:
            break
        ids = build_dialogue(tokenizer, turns)
        inputs.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": load_pixels(turns)})
        start, tokens = start + size, tokens + ids.shape[1]
    return inputs


def dense_cache(model: Any) -> Any:
    """The cache that transformers would use; passed by hand, it switches packing off."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


@torch.no_grad()
def read_pictures(model: Any, prompt: Prompt, pixels: torch.Tensor, cache: Any) -> None:
    """Prefills the pictures' part of a prompt into `cache`."""
    ids = prompt.prefix.to(model.device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
    model(**with_cache(model, inputs, cache), logits_to_keep=1)


def generate(model: Any, prompt: Prompt, cache: Any, **kwargs: Any) -> torch.Tensor:
    """Greedy continuation of a prompt whose pictures `cache` holds: the new ids."""
    ids = prompt.input_ids.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = model.generate(**with_cache(model, inputs, cache), do_sample=False, **kwargs)
    return out[0, ids.shape[1] :]


def forget_question(model: Any, prompt: Prompt, pixels: torch.Tensor, cache: Any, new_cache: Callable[[], Any]) -> Any:
    """A cache of the pictures alone: the same one, cropped, or one read anew where the question's tokens moved others out."""
    extra = int(cache.get_seq_length()) - prompt.prefix_len
    if extra > getattr(cache, "croppable", extra):
        cache = new_cache()
        read_pictures(model, prompt, pixels, cache)
    elif extra > 0:
        cache.crop(-extra)
    return cache


def answer(model: Any, tokenizer: Any, prompt: Prompt, cache: Any) -> str:
    """What the model says to one question."""
    ids = generate(model, prompt, cache, max_new_tokens=ANSWER_TOKENS)
    return tokenizer.decode(ids, skip_special_tokens=True)


def ask_all(
    model: Any,
    tokenizer: Any,
    sets: Sequence[QuestionSet],
    new_packed: Callable[[], Any],
    advance: Callable[[], None] = lambda: None,
) -> Results:
    """Asks every question twice, from a dense and from a packed cache of the same pictures."""
    results = Results()
    for group in sets:
        images = len(group.pictures)
        prompts = [build_prompt(tokenizer, q.text, i, images) for i, q in enumerate(group.pictures[: group.asked])]
        pixels = load_pixels(group.pictures)
        makers = {"dense": lambda: dense_cache(model), "packed": new_packed}
        caches = {name: new_cache() for name, new_cache in makers.items()}
        for cache in caches.values():
            read_pictures(model, prompts[0], pixels, cache)
        for i, prompt in enumerate(prompts):
            said = {name: answer(model, tokenizer, prompt, cache) for name, cache in caches.items()}
            answers = {name: read_answer(text) for name, text in said.items()}
            results.reports.append(caches["packed"].report())
            results.prompt_tokens.append(prompt.input_ids.shape[1])
            question = group.pictures[i]
            shown = question.text if images == 1 else f"image {i + 1}: {question.text}"
            results.rows.append(
                Row(question, shown, answers["dense"], answers["packed"], said["dense"] == said["packed"])
            )
            caches = {n: forget_question(model, prompt, pixels, cache, makers[n]) for n, cache in caches.items()}
            advance()
    return results


class StepClock:
    """A generation streamer that keeps the time of every new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by generate with the prompt first, then with each token."""
        if value.device.type == "cuda":
            torch.cuda.synchronize(value.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate at the end."""

    def steps(self) -> list[float]:
        """Seconds of each decode step: neither the prompt nor the first token, which holds the prefill."""
        kept = self.times[1:]
        return [b - a for a, b in pairwise(kept)]


def decode_time_ratio(
    model: Any, tokenizer: Any, group: QuestionSet, new_packed: Callable[[], Any], rounds: int = 3
) -> float:
    """Median packed decode step over the median dense one, measured in turns after one warm-up each."""
    prompt = build_prompt(tokenizer, group.pictures[0].text, 0, len(group.pictures))
    pixels = load_pixels(group.pictures)
    makers = {"dense": lambda: dense_cache(model), "packed": new_packed}
    caches = {name: new_cache() for name, new_cache in makers.items()}
    for cache in caches.values():
        read_pictures(model, prompt, pixels, cache)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds + 1):
        for name, cache in list(caches.items()):
            clock = StepClock()
            generate(model, prompt, cache, max_new_tokens=TIMED_TOKENS, min_new_tokens=TIMED_TOKENS, streamer=clock)
            caches[name] = forget_question(model, prompt, pixels, cache, makers[name])
            if turn > 0:
                seconds[name] += clock.steps()
    return median(seconds["packed"]) / median(seconds["dense"])
