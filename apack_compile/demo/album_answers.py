"""Answers to questions about an album: from a dense cache, from a shared prefix, and from its file in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apack_compile
from apack_compile.demo.assets import DemoAssetsError
from apack_compile.demo.evaluate import ANSWER_TOKENS, answer, dense_cache, forget_question, read_pictures
from apack_compile.demo.prompts import Prompt, read_answer
from apack_compile.generate.prefix import Prefix
from apack_compile.plan.plan import Plan

PREFIX_FILE, PLAN_FILE, QUESTIONS_FILE = "album.safetensors", "plan.safetensors", "questions.json"


def dense_answers(model: Any, tokenizer: Any, prompts: Sequence[Prompt], pixels: Tensor) -> list[str]:
    """Answers from a dense cache, one question after the other."""
    cache, found = dense_cache(model), []
    read_pictures(model, prompts[0], pixels, cache)
    for prompt in prompts:
        found.append(read_answer(answer(model, tokenizer, prompt, cache)))
        cache = forget_question(model, prompt, pixels, cache, lambda: dense_cache(model))
    return found


def questions_of(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """What comes behind the pictures in each prompt, as one batch, padded on the right."""
    rest = [prompt.input_ids[0, prompt.prefix_len :] for prompt in prompts]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rest, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in rest], batch_first=True),
    }


def shared_answers(tokenizer: Any, prefix: Prefix, questions: Mapping[str, Tensor]) -> list[str]:
    """Answers to all questions at once, from branches of the prefix."""
    at = {name: x.to(prefix.input_ids.device) for name, x in questions.items()}
    ids = prefix.generate(at, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    behind = ids[:, prefix.length + questions["input_ids"].shape[1] :]
    return [read_answer(text) for text in tokenizer.batch_decode(behind, skip_special_tokens=True)]


def answers_of_another_process(
    model: Any, prefix: Prefix, vision_share: float, questions: Mapping[str, Tensor], folder: Path
) -> list[str]:
    """Answers of a process that loads the model, its plan and the prefix from files, and reads no picture."""
    prefix.save(folder / PREFIX_FILE)
    apack_compile.plan_for(model, prefix.length, vision_share).save(folder / PLAN_FILE)
    asked = {name: x.tolist() for name, x in questions.items()}
    (folder / QUESTIONS_FILE).write_text(json.dumps(asked))
    command = [sys.executable, "-P", "-m", "apack_compile.demo.album_answers", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoAssetsError(f"the process that loads the album failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: Path) -> None:
    """The other process: prints its answers as JSON."""
    from apack_compile.demo.assets import load_model, load_tokenizer

    model, tokenizer = load_model(), load_tokenizer()
    apack_compile.optimize(model, plan=Plan.load(folder / PLAN_FILE), compile="none")
    prefix = apack_compile.load_prefix(model, folder / PREFIX_FILE)
    asked = json.loads((folder / QUESTIONS_FILE).read_text())
    questions = {name: torch.tensor(rows) for name, rows in asked.items()}
    print(json.dumps(shared_answers(tokenizer, prefix, questions)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
