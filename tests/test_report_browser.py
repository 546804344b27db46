"""A report's page as a browser shows it: light and dark, on a wide and on a narrow screen."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch

import apack_compile

pytest.importorskip("PyQt6.QtWebEngineWidgets", reason="no browser can be loaded here", exc_type=ImportError)

WIDE, NARROW = 1000, 380


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    model = apack_compile.optimize(tiny_llama.llama(), compile="none", min_tokens=0, ratio=3)
    apack_compile.calibrate(model, {"input_ids": torch.randint(4, 40, (4, 300))})
    model.generate(input_ids=torch.randint(4, 40, (2, 200)), max_new_tokens=3, do_sample=False, eos_token_id=None)
    path = tmp_path_factory.mktemp("page") / "report.html"
    apack_compile.report(model).save(path)
    return path


@pytest.fixture(scope="module", params=list(itertools.product(("light", "dark"), (WIDE, NARROW))), ids=str)
def seen(request, page):
    scheme, width = request.param
    script = Path(__file__).parent / "support" / "browser.py"
    command = [sys.executable, script, page, page.with_suffix(f".{scheme}.{width}.png"), str(width), scheme]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout) | {"scheme": scheme}


def luminance(red: float, green: float, blue: float) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other) -> float:
    """Contrast ratio of two colours (WCAG 2.2): 1 to 21."""
    low, high = sorted((luminance(*one), luminance(*other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_the_background_is_that_of_the_reader_s_system(seen):
    light = luminance(*rgb(seen["background"])) > 0.5
    assert light == (seen["scheme"] == "light")
    assert tuple(seen["corner"]) == rgb(seen["background"])


def test_every_text_can_be_read(seen):
    assert len(seen["texts"]) > 30
    background = rgb(seen["background"])
    faint = [text["text"] for text in seen["texts"] if contrast(rgb(text["colour"]), background) < 4.5]
    assert faint == []


def test_bars_are_painted_as_long_as_they_say(seen):
    assert len(seen["bars"]) == 3 + 2 * 3
    for bar in seen["bars"]:
        width, room = bar["box"][2], bar["track"][2]
        assert room >= 60
        assert abs(width / room - float(bar["share"].removesuffix("%")) / 100) < 0.01
        assert contrast(rgb(bar["colour"]), rgb(seen["background"])) > 1.5
        assert bar["painted"] is None or tuple(bar["painted"]) == rgb(bar["colour"])
    assert sum(bar["painted"] is not None for bar in seen["bars"]) >= 3


def test_nothing_runs_out_of_the_screen(seen):
    assert seen["scroll_width"] <= seen["width"]


def test_the_browser_has_nothing_to_say(seen):
    assert seen["console"] == []
