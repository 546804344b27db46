"""Prompts of the demo model, in the form it was trained on, and how they are cut in two.

A prompt's pictures are read once into a cache; each question is then asked from that cache. So a prompt is
tokenised whole and cut behind its last picture: `prefix` (pictures) + `rest` (question), exact by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apack_compile.demo.assets import DemoAssetsError, Question

PLACEHOLDER = "<empty_output>"
TOKENS_PER_IMAGE = 64
IMAGE_SIZE = 64
MEAN, STD = 0.5, 0.25
USER, END = "<|im_start|>user\n", "<|im_end|>"
ASSISTANT = f"{END}\n<|im_start|>assistant\n"
# easy-VQA's answers; none begins with another.
ANSWERS = (
    *("circle", "rectangle", "triangle", "yes", "no"),
    *("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)


@dataclass(frozen=True)
class Prompt:
    """Token ids `[1, T]` of one question and the number of them that belong to the pictures."""

    input_ids: torch.Tensor
    prefix_len: int

    @property
    def prefix(self) -> torch.Tensor:
        """The pictures' part, `[1, prefix_len]`."""
        return self.input_ids[:, : self.prefix_len]


def pictures_text(images: int) -> str:
    """The part of a prompt that holds the pictures' placeholders."""
    if images < 1:
        raise ValueError(f"images per prompt must be at least 1, got {images}")
    block = PLACEHOLDER * TOKENS_PER_IMAGE
    if images == 1:
        return f"{USER}{block}\n"
    return USER + "".join(f"Image {i + 1}: {block}\n" for i in range(images))


def question_text(question: str, image: int, images: int) -> str:
    """A question about picture `image` (counted from 0) of `images`."""
    return question if images == 1 else f"In image {image + 1}, {question}"


def build_prompt(tokenizer: Any, question: str, image: int, images: int) -> Prompt:
    """Tokenises one question and finds the cut: behind the newline that follows the last placeholder."""
    text = pictures_text(images) + question_text(question, image, images) + ASSISTANT
    ids = tokenizer(text, return_tensors="pt").input_ids
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    places = (ids[0] == placeholder).nonzero().flatten()
    if places.numel() != images * TOKENS_PER_IMAGE:
        raise ValueError(f"the question may not contain {PLACEHOLDER!r}: {question!r}")
    return Prompt(ids, int(places[-1]) + 2)


def build_dialogue(tokenizer: Any, turns: Sequence[Question]) -> torch.Tensor:
    """A whole conversation, one question and its true answer about each picture, as in training: `[1, T]`."""
    images = len(turns)
    text = pictures_text(images)
    for i, turn in enumerate(turns):
        opening = "" if i == 0 else f"\n{USER}"
        text += f"{opening}{question_text(turn.text, i, images)}{ASSISTANT}{turn.answer}{END}"
    return tokenizer(text, return_tensors="pt").input_ids


def load_pixels(questions: Sequence[Question]) -> torch.Tensor:
    """The questions' pictures as the vision tower takes them: float32 `[n, 3, 64, 64]`."""
    from PIL import Image, UnidentifiedImageError

    pictures = []
    for question in questions:
        try:
            with Image.open(question.image) as image:
                pictures.append(pixels_of(image.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise DemoAssetsError(f"the picture {question.image} cannot be read: {error}") from error
    return torch.stack(pictures)


def pixels_of(picture: Any) -> torch.Tensor:
    """A PIL picture in colours as the vision tower takes it: float32 `[3, 64, 64]`."""
    import numpy as np

    pixels = np.array(picture.resize((IMAGE_SIZE, IMAGE_SIZE)), dtype=np.float32)
    return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - MEAN) / STD


def read_answer(text: str) -> str:
    """The answer that a generated text begins with; the whole text where it is none of easy-VQA's.

    The model never saw as many pictures as the demo can show it, and may then babble on after its answer.
    """
    text = text.strip().lower()
    return next((answer for answer in ANSWERS if text.startswith(answer)), text)
