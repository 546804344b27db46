"""Every model type of transformers' image-text-to-text mapping keeps the contract, or docs/support.md says why not."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from matrix.building import case_of, class_names
from matrix.isolation import run_apart
from matrix.outcome import DENSE_LAYERS, WORKS
from matrix.table import render
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# One of each kind: plain, several coordinates, heads of several sizes and shared layers, linear attention, cross-attention,
# pictures beside the text, a language model inside that generates, encoder-decoder.
SAMPLE = ("llava", "qwen2_5_vl", "gemma4", "qwen3_5", "mllama", "idefics", "blip-2", "florence2")
PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_model")
        metafunc.parametrize("model_type", list(class_names()) if every else SAMPLE)


def test_a_model_type_keeps_the_contract(model_type, request):
    if model_type not in class_names():
        pytest.skip(f"this transformers has no {model_type}")
    outcome = run_apart(model_type)
    folder = request.config.getoption("results")
    if folder is not None:
        path = Path(folder) / f"{model_type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(outcome)))
    expected = case_of(model_type).expected
    assert outcome.status in ((WORKS, DENSE_LAYERS) if expected is None else (expected,)), outcome


def test_the_page_lists_every_type_once():
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert not set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(listed)


def test_the_page_counts_what_it_lists():
    outcome = {"layers": "4 packed", "decode": "compiled", "held": "4.1", "prompt": "picture of 4 tokens", "reason": ""}
    outcomes = [
        {"model_type": "b", "status": WORKS, **outcome},
        {"model_type": "a", "status": WORKS, **outcome, "reason": "x|y"},
        {"model_type": "c", "status": DENSE_LAYERS, **outcome},
    ]
    page = render(outcomes, ["a", "b"], {"transformers": "5", "torch": "2"})
    assert "2 types: 2 works." in page and "1 types: 1 works with dense layers." in page
    assert page.index("`a`") < page.index("`b`") < page.index("`c`") and "x\\|y" in page
