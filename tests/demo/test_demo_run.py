"""The demo runs for real, small: two questions, one picture each, decode not compiled."""

import json
import math
import sys
from pathlib import Path

import pytest

for module in ("gguf", "accelerate", "PIL", "matplotlib", "rich"):
    pytest.importorskip(module, reason="the demo extra is not installed")

from apack_compile.demo import run
from apack_compile.demo.assets import DemoAssetsError
from apack_compile.demo.inspect import inspect_lines
from apack_compile.demo.run import DemoOptions, run_demo

KEYS = {
    "ratio",
    "answers_equal",
    "accuracy_dense",
    "accuracy_packed",
    "dense_bytes",
    "sequence_bytes",
    "model_bytes",
    "tokens_per_prompt",
    "questions",
    "decode_time_ratio",
}
ALBUM_KEYS = {"throughput_at_equal_bytes", "shared_prefix_step_ratio", "reloaded_answers_equal"}


@pytest.mark.slow
def test_a_small_run_writes_flat_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("easy_vqa", reason="the demo's assets are not installed")
    options = DemoOptions(
        preset="lossless",
        images_per_prompt=1,
        questions=2,
        album=2,
        compile="none",
        json_path=tmp_path / "demo.json",
        png_path=tmp_path / "demo.png",
    )
    summary = run_demo(options)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written == summary
    assert set(written) >= KEYS | ALBUM_KEYS
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in written.values())
    assert written["answers_equal"] == 1.0
    assert written["questions"] == 2
    # a lossless album answers as a dense one does, and so does its file in another process
    assert written["album_pictures"] == 2 and written["album_answers_equal"] == written["reloaded_answers_equal"] == 1.0
    shared, copied = written["shared_bytes_of_branches"], written["copied_bytes_of_branches"]
    assert shared < copied / 4
    assert copied / 32 < written["album_file_bytes"] < copied / 8
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    assert "truth" in out and "answers equal 100.0%" in out and "an album of 2 pictures" in out


def test_a_missing_matplotlib_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the demo ran")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(run, "load_questions", never)
    with pytest.raises(DemoAssetsError, match="'matplotlib' is not installed"):
        run_demo(DemoOptions(png_path=tmp_path / "demo.png"))


def test_inspect_lists_every_layer_of_the_demo_model() -> None:
    lines = inspect_lines(None)
    assert "30 layers" in lines[0]
    (row,) = [line for line in lines if line.endswith("packed")]
    assert row.split() == ["0-29", "full_attention", "3", "192", "192", "all", "packed"]


def test_inspect_gives_the_reason_of_a_layer_that_stays_dense(tmp_path: Path) -> None:
    from transformers import MllamaConfig

    text_config = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "cross_attention_layers": [1],
    }
    MllamaConfig(text_config=text_config).save_pretrained(tmp_path)
    text = "\n".join(inspect_lines(tmp_path))
    assert "dense (cross_attention" in text
    assert "out of reach" in text
