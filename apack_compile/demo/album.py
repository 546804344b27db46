"""The demo's second part: one album of pictures, and many requests about it.

Questions share the album, packed once. It is written to a file, loaded by another process, and asked again. Then decode steps are timed:
as many requests as fit in the bytes of a few dense ones, and branches of one prefix beside copies of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import apack_compile
from apack_compile.demo.album_answers import (
    PREFIX_FILE,
    answers_of_another_process,
    dense_answers,
    questions_of,
    shared_answers,
)
from apack_compile.demo.assets import Question
from apack_compile.demo.evaluate import dense_cache, read_pictures
from apack_compile.demo.prompts import TOKENS_PER_IMAGE, build_prompt, load_pixels
from apack_compile.demo.steps import Steps, seconds_in_turns

GIB = 2**30
# Requests whose dense caches are the budget, and branches of one prefix.
DENSE_REQUESTS, BRANCHES = 4, 16
# Calls of `advance`.
PARTS = 5


@dataclass(frozen=True)
class Album:
    """Figures of an album; bytes of dense caches are those of 16-bit ones.

    throughput_at_equal_bytes, shared_prefix_step_ratio: of steps that are not compiled. answers: of the questions, from the shared album.
    """

    album_pictures: int
    album_tokens: int
    album_answers_equal: float
    album_accuracy_dense: float
    album_accuracy_shared: float
    reloaded_answers_equal: float
    album_file_bytes: int
    branches: int
    dense_bytes_of_branches: int
    copied_bytes_of_branches: int
    shared_bytes_of_branches: int
    dense_requests_in_gib: int
    packed_requests_in_gib: int
    dense_requests: int
    packed_requests: int
    dense_tokens_per_second: float
    packed_tokens_per_second: float
    throughput_at_equal_bytes: float
    shared_prefix_step_ratio: float

    @property
    def figures(self) -> dict[str, float]:
        """All of them, by name."""
        return asdict(self)


def show_album(
    model: Any, tokenizer: Any, pictures: Sequence[Question], folder: Path, advance: Callable[[], None]
) -> Album:
    """Reads an album of these pictures, asks one question about each, and counts and times what that takes.

    folder: for the album's file. advance: called `PARTS` times.
    """
    prompts = [build_prompt(tokenizer, one.text, i, len(pictures)) for i, one in enumerate(pictures)]
    pixels, truths = load_pixels(pictures), [one.answer for one in pictures]
    dense = dense_answers(model, tokenizer, prompts, pixels)
    advance()
    ids = prompts[0].prefix.to(model.device)
    prefix = apack_compile.read(model, input_ids=ids, pixel_values=pixels.to(model.device, model.dtype))
    questions = questions_of(prompts)
    shared = shared_answers(tokenizer, prefix, questions)
    advance()
    vision = len(pictures) * TOKENS_PER_IMAGE / prefix.length
    again = answers_of_another_process(model, prefix, vision, questions, folder)
    advance()

    def cache_of(rows: int, packed: bool) -> Any:
        """A cache of so many rows that hold the album, each for itself."""
        cache = apack_compile.new_cache(model) if packed else dense_cache(model)
        read_pictures(model, prompts[0], pixels, cache)
        cache.batch_repeat_interleave(rows)
        return cache

    one_dense = prefix.report()["dense_bytes"]
    fitting, in_gib = (
        apack_compile.largest_batch(model, prefix.length, budget, vision)
        for budget in (DENSE_REQUESTS * one_dense, GIB)
    )
    if not fitting:
        raise ValueError(
            f"album={len(pictures)}: not one packed request fits in the bytes of {DENSE_REQUESTS} dense ones"
        )
    equal = seconds_in_turns(
        {
            "dense": Steps(model, cache_of(DENSE_REQUESTS, False), DENSE_REQUESTS),
            "packed": Steps(model, cache_of(fitting, True), fitting),
        }
    )
    advance()
    copies, branches = cache_of(BRANCHES, True), prefix.branch(BRANCHES)
    held = {name: int(cache.report()["sequence_bytes"]) for name, cache in (("copies", copies), ("shared", branches))}
    steps = seconds_in_turns({"copies": Steps(model, copies, BRANCHES), "shared": Steps(model, branches, BRANCHES)})
    advance()
    rates = {"dense": DENSE_REQUESTS / equal["dense"], "packed": fitting / equal["packed"]}
    return Album(
        album_pictures=len(pictures),
        album_tokens=prefix.length,
        album_answers_equal=share_of_equal(dense, shared),
        album_accuracy_dense=share_of_equal(dense, truths),
        album_accuracy_shared=share_of_equal(shared, truths),
        reloaded_answers_equal=share_of_equal(shared, again),
        album_file_bytes=(folder / PREFIX_FILE).stat().st_size,
        branches=BRANCHES,
        dense_bytes_of_branches=BRANCHES * one_dense,
        copied_bytes_of_branches=held["copies"],
        shared_bytes_of_branches=held["shared"],
        dense_requests_in_gib=GIB // one_dense,
        packed_requests_in_gib=in_gib,
        dense_requests=DENSE_REQUESTS,
        packed_requests=fitting,
        dense_tokens_per_second=rates["dense"],
        packed_tokens_per_second=rates["packed"],
        throughput_at_equal_bytes=rates["packed"] / rates["dense"],
        shared_prefix_step_ratio=steps["shared"] / steps["copies"],
    )


def share_of_equal(answers: Sequence[str], others: Sequence[str]) -> float:
    """How many of the answers are as the others."""
    return sum(a == b for a, b in zip(answers, others, strict=True)) / len(answers)
