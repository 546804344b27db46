"""Prompts are what the demo model was trained on, and the cut behind the pictures is exact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="the demo extra is not installed")
pytest.importorskip("PIL", reason="the demo extra is not installed")

from apack_compile.demo.assets import DemoAssetsError, Question, load_questions, load_tokenizer
from apack_compile.demo.evaluate import CALIBRATION_TOKENS, calibration_inputs, question_sets
from apack_compile.demo.prompts import (
    PLACEHOLDER,
    TOKENS_PER_IMAGE,
    build_dialogue,
    build_prompt,
    load_pixels,
    pictures_text,
    read_answer,
)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Any]:
    try:
        yield load_tokenizer()
    except DemoAssetsError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("images", [1, 2, 5, 16])
def test_prefix_is_the_tokens_of_the_pictures_text_alone(tokenizer: Any, images: int) -> None:
    prompt = build_prompt(tokenizer, "is there a circle?", images - 1, images)
    alone = tokenizer(pictures_text(images), return_tensors="pt").input_ids
    assert torch.equal(prompt.prefix, alone)
    assert prompt.input_ids.shape[1] > prompt.prefix_len


@pytest.mark.parametrize("images", [1, 16])
def test_every_test_question_shares_the_prefix_and_keeps_all_placeholders(tokenizer: Any, images: int) -> None:
    prefix = tokenizer(pictures_text(images), return_tensors="pt").input_ids
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    for text in {question.text for group in load_questions("test", 0) for question in group}:
        prompt = build_prompt(tokenizer, text, images - 1, images)
        assert torch.equal(prompt.prefix, prefix)
        assert int((prompt.input_ids == placeholder).sum()) == images * TOKENS_PER_IMAGE


def test_a_placeholder_in_the_question_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="may not contain"):
        build_prompt(tokenizer, f"what is {PLACEHOLDER}?", 0, 1)


def test_a_dialogue_begins_with_its_first_prompt(tokenizer: Any) -> None:
    turns = [group[0] for group in load_questions("train", 0)[:3]]
    ids = build_dialogue(tokenizer, turns)
    prompt = build_prompt(tokenizer, turns[0].text, 0, 3)
    assert torch.equal(ids[:, : prompt.input_ids.shape[1]], prompt.input_ids)


@pytest.mark.parametrize("images", [1, 4, 16])
def test_calibration_holds_enough_tokens_of_training_pictures(tokenizer: Any, images: int) -> None:
    inputs = calibration_inputs(tokenizer, load_questions("train", 0), images)
    assert len(inputs) >= 4
    tokens = sum(entry["input_ids"].shape[1] for entry in inputs)
    assert CALIBRATION_TOKENS <= tokens <= CALIBRATION_TOKENS + 2_000
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    for entry in inputs:
        assert int((entry["input_ids"] == placeholder).sum()) == TOKENS_PER_IMAGE * len(entry["pixel_values"])


def test_train_and_test_pictures_are_disjoint_files() -> None:
    train, test = ({q.image for group in load_questions(split, 0) for q in group} for split in ("train", "test"))
    assert train and test and not train & test


def test_sets_hold_each_picture_once_and_as_many_questions_as_asked() -> None:
    groups = [[Question(Path(f"{i}.png"), "q", "a")] for i in range(20)]
    sets = question_sets(groups, questions=10, images=4)
    assert [len(group.pictures) for group in sets] == [4, 4, 4]
    assert [group.asked for group in sets] == [4, 4, 2]
    used = [question.image for group in sets for question in group.pictures]
    assert len(set(used)) == 12


@pytest.mark.parametrize(
    ("questions", "images", "named"), [(0, 1, "questions"), (1, 0, "images"), (21, 1, "questions")]
)
def test_impossible_sizes_name_the_option_and_the_value(questions: int, images: int, named: str) -> None:
    groups = [[Question(Path(f"{i}.png"), "q", "a")] for i in range(20)]
    with pytest.raises(ValueError, match=named):
        question_sets(groups, questions, images)


def test_pixels_are_normalised_as_in_training(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (30, 20), (255, 0, 128)).save(tmp_path / "a.png")
    pixels = load_pixels([Question(tmp_path / "a.png", "q", "a")])
    assert pixels.shape == (1, 3, 64, 64) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([2.0, -2.0, (128 / 255 - 0.5) / 0.25]))


def test_answers_are_compared_without_case_and_spaces() -> None:
    assert read_answer("  Yes\n") == "yes"
    assert read_answer("no per unit") == "no"
    assert read_answer("perhaps") == "perhaps"


def test_texts_can_be_padded(tokenizer: Any) -> None:
    padded = tokenizer(["one", "one and two"], return_tensors="pt", padding=True, padding_side="left")
    assert padded.attention_mask[0, 0] == 0 and padded.input_ids[0, 0] == tokenizer.pad_token_id
