"""Rows of a batch as inputs of a model, in groups of similar length."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from apack_compile.models.chat import chat_inputs

# Prompts up to so many tokens count as equally long: more rows in a group are worth more than the padding costs.
SHORT = 64
# Of the longest prompt of a group, how long the shortest one is at least.
SIMILAR = 0.75


@dataclass(frozen=True)
class Row:
    """One prompt: its place in the batch, and a model's inputs, `input_ids` `[1, T]` and what goes with them."""

    place: int
    inputs: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, placeholders of pictures included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def kind(self) -> tuple:
        """What rows of one group have in common: which inputs they have, and the shapes of those that are put end to end."""
        return tuple(
            (name, (-1,) if self.is_per_token(name) else tuple(x.shape[1:])) for name, x in sorted(self.inputs.items())
        )

    def is_per_token(self, name: str) -> bool:
        """Whether an input has a number for each token."""
        return self.inputs[name].shape == self.inputs["input_ids"].shape


def inputs_of(speaker: Any, prompt: Any, pictures: Sequence[Any] | None, chat: bool) -> dict[str, Tensor]:
    """Inputs of one prompt, by a tokenizer or, with pictures (which may be none in a row), a processor; raises ValueError."""
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt is {prompt!r}, no string")
    if chat:
        given = chat_inputs(speaker, prompt, pictures)
    elif pictures is not None:
        given = speaker(images=list(pictures) or None, text=prompt, return_tensors="pt")
    else:
        given = speaker(text=prompt, return_tensors="pt")
    inputs = {name: x for name, x in dict(given).items() if isinstance(x, Tensor)}
    if not inputs["input_ids"].shape[1]:
        raise ValueError("the prompt has no tokens")
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def pictures_in(cell: Any) -> list[Any]:
    """The pictures of a cell: none for None, an array `[H, W, 3]`, the bytes of a file, a PIL picture, or a list of these."""
    if cell is None:
        return []
    if isinstance(cell, bytes):
        from PIL import Image

        return [Image.open(io.BytesIO(cell)).convert("RGB")]
    if (
        isinstance(cell, (list, tuple))
        or getattr(getattr(cell, "dtype", None), "hasobject", False)
        or getattr(cell, "ndim", 0) == 4
    ):
        return [picture for one in cell for picture in pictures_in(one)]
    return [cell]


def groups_of(
    rows: Sequence[Row], new_tokens: int, max_tokens: int, fitting: Callable[[Row], int | None]
) -> Iterator[list[Row]]:
    """Groups of rows that are generated together, the longest first, each of prompts of similar length.

    Padded prompts and new tokens of a group are at most `max_tokens`, its rows at most `fitting` of its longest. A row alone may be more.
    """
    group: list[Row] = []
    limit = 1
    for row in sorted(rows, key=lambda row: (row.kind, row.tokens), reverse=True):
        if group:
            longest = group[0].tokens
            similar = row.tokens >= SIMILAR * longest or longest <= SHORT
            if len(group) == limit or not similar or row.kind != group[0].kind:
                yield group
                group = []
        if not group:
            fit = fitting(row)
            limit = max_tokens // (row.tokens + new_tokens)
            limit = max(limit if fit is None else min(limit, fit), 1)
        group.append(row)
    if group:
        yield group


def padded(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Inputs of several rows of one kind: what belongs to tokens is padded on the left to `[B, T]`, the rest put end to end."""
    longest = max(row.tokens for row in rows)
    inputs = {}
    for name in rows[0].inputs:
        fill = pad_id if name == "input_ids" else 0
        parts = [
            pad(row.inputs[name], (longest - row.tokens, 0), value=fill) if row.is_per_token(name) else row.inputs[name]
            for row in rows
        ]
        inputs[name] = torch.cat(parts)
    return inputs
