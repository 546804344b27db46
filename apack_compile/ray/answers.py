"""The callable class of `map_batches`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apack_compile.api import largest_batch, optimize
from apack_compile.demo.inspect import auto_class, config_at
from apack_compile.generate.session import session_of
from apack_compile.models.modality import vision_of
from apack_compile.models.wrappers import unwrapped
from apack_compile.ray.job import BatchJob
from apack_compile.ray.rows import Row, groups_of, inputs_of, padded, pictures_in

LOCAL = {"local_files_only": True, "trust_remote_code": False}
# Of the rows that an error names.
NAMED = 5


class Answers:
    """For `map_batches`: loads a job's model and plan when an actor begins, then answers batches of rows.

    Rows of a batch are generated in groups of similar length and keep their order. Beside the batch's own columns, the result has that
    of the answers. Raises ValueError for a column that is missing, and for rows that cannot be read, unless the job has a column for
    errors; it names them.
    """

    def __init__(self, job: BatchJob) -> None:
        if not isinstance(job, BatchJob):
            raise TypeError(f"job={job!r} must be an apack_compile.ray.BatchJob")
        self.job = job
        self.model, self.speaker = loaded(job.model)
        if job.pictures is not None and not hasattr(self.speaker, "image_processor"):
            raise ValueError(f"pictures={job.pictures!r}: the model came with a tokenizer alone, and reads no pictures")
        self.tokenizer = getattr(self.speaker, "tokenizer", self.speaker)
        arguments = job.optimize_arguments()
        if arguments or session_of(unwrapped(self.model)) is None:
            optimize(self.model, **arguments)
        self.fits: dict[tuple[int, int], int] = {}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its answers; columns are arrays `[B, ...]` or lists."""
        job = self.job
        for column in (job.prompt, job.pictures, job.key):
            if column is not None and column not in batch:
                raise ValueError(f"no column {column!r} in the dataset; it has {', '.join(map(repr, batch))}")
        rows, wrong = self._read(batch)
        if wrong and job.error is None:
            raise ValueError(f"{named(wrong, batch.get(job.key))}; error= names a column for such rows")
        answers = [""] * len(batch[job.prompt])
        for group in groups_of(rows, job.max_new_tokens, job.max_tokens, self._fitting):
            for row, text in zip(group, self._generated(group), strict=True):
                answers[row.place] = text
        result = dict(batch) | {job.answer: np.array(answers, dtype=object)}
        if job.error is not None:
            result[job.error] = np.array([wrong.get(place, "") for place in range(len(answers))], dtype=object)
        return result

    def _read(self, batch: Mapping[str, Any]) -> tuple[list[Row], dict[int, str]]:
        """The rows as inputs of the model, and what is wrong with the others, by place."""
        job, rows, wrong = self.job, [], {}
        for place, prompt in enumerate(batch[job.prompt]):
            try:
                pictures = None if job.pictures is None else pictures_in(batch[job.pictures][place])
                row = Row(place, inputs_of(self.speaker, prompt, pictures, job.chat))
            except Exception as error:  # whatever a tokenizer, a processor or PIL makes of one row
                wrong[place] = (str(error).strip() or type(error).__name__).splitlines()[0]
                continue
            if self._fitting(row) == 0:
                tokens = row.tokens + job.max_new_tokens
                wrong[place] = f"a cache of its {tokens} tokens takes more than budget_bytes={job.budget_bytes}"
            else:
                rows.append(row)
        return rows, wrong

    def _fitting(self, row: Row) -> int | None:
        """How many rows like this one fit in the job's bytes; None where it has no limit."""
        if self.job.budget_bytes is None:
            return None
        vision = vision_of(self.model.config, row.inputs)
        seen = 0 if vision is None else int(vision.sum())
        tokens = row.tokens + self.job.max_new_tokens
        if (tokens, seen) not in self.fits:
            self.fits[tokens, seen] = largest_batch(self.model, tokens, self.job.budget_bytes, seen / tokens)
        return self.fits[tokens, seen]

    def _generated(self, group: list[Row]) -> list[str]:
        """The answers of a group."""
        model = self.model
        inputs = {
            name: x.to(model.device, model.dtype) if x.is_floating_point() else x.to(model.device)
            for name, x in padded(group, self._pad_id).items()
        }
        tokens = model.generate(
            **inputs, pad_token_id=self._pad_id, max_new_tokens=self.job.max_new_tokens, **self.job.generate
        )
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    @property
    def _pad_id(self) -> int:
        """A token for padding, which no row attends to: the tokenizer's, else the one that ends a sequence."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in ids if token is not None)


def loaded(model: Any) -> tuple[Any, Any]:
    """A model and its tokenizer or processor, from a local folder or a job's function; raises ValueError for what is neither."""
    if not isinstance(model, (str, os.PathLike)):
        found = model()
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], torch.nn.Module):
            raise ValueError(
                f"model: the function gave {type(found).__name__}; it must return (model, tokenizer or processor)"
            )
        return found
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    folder = Path(model)
    auto = auto_class(config_at(folder), str(model))
    speaker = AutoProcessor if auto is AutoModelForImageTextToText else AutoTokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = auto.from_pretrained(folder, dtype="auto", **LOCAL).eval().to(device)
    return weights, speaker.from_pretrained(folder, **LOCAL)


def named(wrong: Mapping[int, str], keys: Any) -> str:
    """Rows with what is wrong with them, by their keys where there are any."""
    rows = [f"{place} of the batch" if keys is None else str(keys[place]) for place in wrong]
    lines = [f"row {row}: {reason}" for row, reason in zip(rows[:NAMED], wrong.values(), strict=False)]
    more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return "; ".join(lines) + more
