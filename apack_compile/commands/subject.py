"""The model of a command: the demo's, or one in a local folder; never from the network, never with code from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apack_compile.demo.assets import load_model, load_questions, load_tokenizer
from apack_compile.demo.inspect import auto_class, config_at
from apack_compile.demo.prompts import ASSISTANT, USER, pictures_text, pixels_of
from apack_compile.models.chat import chat_inputs

DEMO = "demo model"
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Subject:
    """A model with what makes its inputs. processor: of text and pictures; None where the model reads no pictures, and of the demo."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any = None
    is_demo: bool = False

    @property
    def reads_pictures(self) -> bool:
        """Whether prompts may have pictures."""
        return self.is_demo or self.processor is not None

    def question(self, text: str, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Inputs that ask `text` about PIL pictures; raises ValueError for pictures that the model cannot read."""
        if pictures and not self.reads_pictures:
            raise ValueError(
                f"image: {self.name} reads no pictures; leave --image out, or pass a vision-language model"
            )
        if self.is_demo:
            return self._demo_question(text, pictures)
        speaker = self.processor if self.reads_pictures else self.tokenizer
        if getattr(speaker, "chat_template", None):
            given = chat_inputs(speaker, text, pictures if self.reads_pictures else None)
        elif self.reads_pictures:
            placeholders = f"{getattr(speaker, 'image_token', '<image>')} " * len(pictures)
            given = speaker(images=list(pictures) or None, text=placeholders + text, return_tensors="pt")
        else:
            given = speaker(text, return_tensors="pt")
        return self._on_device(given)

    def text(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs of plain text with token ids `[T]`."""
        return self._on_device({"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})

    def _demo_question(self, text: str, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
        opening = pictures_text(len(pictures)) if pictures else USER
        ids = self.tokenizer(opening + text + ASSISTANT, return_tensors="pt").input_ids
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures:
            given["pixel_values"] = torch.stack([pixels_of(picture) for picture in pictures])
        return self._on_device(given)

    def _on_device(self, given: Any) -> dict[str, torch.Tensor]:
        """On the model's device; pictures in its dtype."""
        model = self.model
        return {
            name: x.to(model.device, model.dtype) if x.is_floating_point() else x.to(model.device)
            for name, x in dict(given).items()
            if isinstance(x, torch.Tensor)
        }


def load_subject(path: Path | None) -> Subject:
    """The model of a folder, or the demo's for None; raises ValueError for a folder without a model that can be loaded."""
    if path is None:
        return Subject(DEMO, load_model(), load_tokenizer(), is_demo=True)
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    config, name = config_at(path), str(path)
    folder = path if path.is_dir() else path.parent
    auto = auto_class(config, name)
    reads_pictures = auto is AutoModelForImageTextToText
    try:
        model = auto.from_pretrained(folder, dtype="auto", **LOCAL).eval()
        processor = AutoProcessor.from_pretrained(folder, **LOCAL) if reads_pictures else None
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL) if processor is None else processor.tokenizer
    except Exception as error:  # whatever transformers and a model's own classes make of missing or damaged files
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"MODEL={name!r} cannot be loaded ({type(error).__name__}: {first})") from error
    return Subject(name, model, tokenizer, processor)


def open_picture(path: Path) -> Any:
    """A PIL picture in colours; raises ValueError for a file that is missing or none."""
    if not path.is_file():
        raise ValueError(f"image={str(path)!r} does not exist; pass a picture's file")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("pictures need pillow: pip install pillow", name="PIL") from error
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image={str(path)!r} is no picture that can be read ({error})") from error


def demo_question() -> tuple[Path, str]:
    """A picture of the demo's test set, and a question about it."""
    first = load_questions("test", seed=0)[0][0]
    return first.image, first.text
