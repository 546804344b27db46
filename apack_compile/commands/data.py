"""What `apack-compile calibrate` reads: text files, and pictures with the texts that belong to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apack_compile.commands.subject import Subject, open_picture
from apack_compile.demo.assets import load_questions
from apack_compile.demo.evaluate import calibration_inputs
from apack_compile.models.modality import vision_of

TEXTS = (".txt", ".md", ".rst")
LINES = ".jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
QUESTION = "What is in this picture? Describe it."
DEMO_PICTURES = 4


@dataclass(frozen=True)
class Sample:
    """A text with the pictures in front of it."""

    text: str
    pictures: tuple[Path, ...] = ()


def calibration_data(subject: Subject, data: Path | None, length: int) -> list[dict[str, torch.Tensor]]:
    """Inputs to calibrate on: of a file or folder, or, for the demo's model, its training pictures.

    Text is cut into pieces of `length` tokens. Raises ValueError for data that are missing, empty or of another kind.
    """
    if data is None:
        if not subject.is_demo:
            raise ValueError("data: pass --data FILE or FOLDER with text, or with pictures, that are like your prompts")
        training = load_questions("train", seed=0)
        return calibration_inputs(subject.tokenizer, training, DEMO_PICTURES)
    if not data.exists():
        raise ValueError(f"data={str(data)!r} does not exist; pass a file or a folder")
    samples = list(_samples(data))
    if not samples:
        kinds = ", ".join((*TEXTS, LINES, *PICTURES))
        raise ValueError(f"data={str(data)!r} holds no text and no picture; files that are read end in {kinds}")
    return [given for sample in samples for given in _inputs(subject, sample, length)]


def vision_share(subject: Subject, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Share of vision tokens in some inputs."""
    found = [vision_of(subject.model.config, given) for given in inputs]
    vision = sum(int(flags.sum()) for flags in found if flags is not None)
    return vision / sum(given["input_ids"].numel() for given in inputs)


def _samples(data: Path) -> Iterator[Sample]:
    """What a file holds, or all files of a folder in the order of their names."""
    if data.is_dir():
        files = sorted(file for file in data.rglob("*") if file.suffix.lower() in (*TEXTS, LINES, *PICTURES))
        pictures = {file.with_suffix("") for file in files if file.suffix.lower() in PICTURES}
        for file in files:
            # a text named as a picture is the picture's
            if file.suffix.lower() not in TEXTS or file.with_suffix("") not in pictures:
                yield from _samples(file)
    elif data.suffix.lower() in PICTURES:
        beside = next((file for kind in TEXTS if (file := data.with_suffix(kind)).is_file()), None)
        yield Sample(QUESTION if beside is None else _text_of(beside), (data,))
    elif data.suffix.lower() == LINES:
        yield from _lines(data)
    else:
        yield Sample(_text_of(data))


def _lines(file: Path) -> Iterator[Sample]:
    """Of a file with a JSON object a line: its "text", and its "image" or "images", named from the file's folder."""
    for number, line in enumerate(_text_of(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"data={str(file)!r}, line {number}"
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: is no JSON ({error})") from error
        text = row.get("text") if isinstance(row, dict) else row
        named = (row.get("images") or row.get("image") or []) if isinstance(row, dict) else []
        named = [named] if isinstance(named, str) else named
        if not isinstance(text, str) or not isinstance(named, list) or not all(isinstance(one, str) for one in named):
            raise ValueError(
                f'{where}: must be a string, or an object with "text" and, where there are pictures, "images"'
            )
        if not text.strip():
            raise ValueError(f"{where}: the text is empty")
        yield Sample(text, tuple(file.parent / name for name in named))


def _text_of(file: Path) -> str:
    """A file's text; raises ValueError for one that is empty or none."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data={str(file)!r} is no text in UTF-8 ({error})") from error
    if not text.strip():
        raise ValueError(f"data={str(file)!r} is empty; pass text that is like your prompts")
    return text


def _inputs(subject: Subject, sample: Sample, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """A sample as a model's inputs: with its pictures in one piece, else in pieces of `length` tokens."""
    if sample.pictures:
        yield subject.question(sample.text, [open_picture(path) for path in sample.pictures])
        return
    ids = torch.tensor(subject.tokenizer(sample.text).input_ids)
    for piece in ids.split(length):
        yield subject.text(piece)
