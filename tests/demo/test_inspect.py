"""`apack-compile inspect`: rows, totals and errors, from a config alone."""

import json
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MambaConfig, T5Config, ViTConfig

from apack_compile.demo.inspect import inspect_lines, ranges_of

LAYERS = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 4
WINDOW = 512


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    config = Gemma3TextConfig(
        num_hidden_layers=len(LAYERS),
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=64,
        sliding_window=WINDOW,
        layer_types=LAYERS,
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_numbers_are_told_as_ranges() -> None:
    assert ranges_of([0, 1, 2, 3, 4, 6, 8, 9]) == "0-4, 6, 8-9"
    assert ranges_of([]) == ""


def test_equal_layers_are_one_row_and_say_what_they_keep(gemma: Path) -> None:
    lines = inspect_lines(gemma)
    sliding, full = lines[2], lines[3]
    assert sliding.startswith("0-4, 6-9") and f"last {WINDOW}" in sliding
    assert full.split()[:2] == ["5", "full_attention"] and full.endswith("packed")
    assert lines[4] == ""


def test_a_folder_and_its_config_are_read_alike(gemma: Path) -> None:
    assert inspect_lines(gemma / "config.json")[1:] == inspect_lines(gemma)[1:]


def test_totals_count_a_window_once_it_is_full(gemma: Path) -> None:
    token, lines = 2 * 2 * 64 * 2, inspect_lines(gemma)
    for tokens in (8_192, 32_768):
        (line,) = [line for line in lines if line.startswith(f"{tokens:>7,} tokens")]
        dense = (tokens + 9 * WINDOW) * token
        assert f"{dense / 1e6:,.1f} MB dense" in line
        assert f"{9 * WINDOW * token / 1e6:,.1f} MB in layers with a window" in line


def test_what_stays_dense_keeps_its_bytes_at_a_ratio(gemma: Path) -> None:
    token, lines = 2 * 2 * 64 * 2, inspect_lines(gemma)
    stays = not lines[2].endswith("packed")
    (row,) = [line for line in lines if line.split()[:2] == ["4", "4.00"]]
    for tokens in (8_192, 32_768):
        dense = (tokens + 9 * WINDOW) * token
        held = tokens * token / 4 + 9 * WINDOW * token / (1 if stays else 4)
        assert f"{held / 1e6:,.1f} MB ({dense / held:.2f}x)" in row


def test_shared_bases_are_told_with_their_share_of_the_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8,
        head_dim=64, intermediate_size=8_192, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    lines = inspect_lines(tmp_path)
    layer = 4 * 512 * 512 + 3 * 512 * 8_192 + 2 * 512
    weights = 2 * (3 * layer + 2 * 96 * 512 + 512)
    assert f"weights in bfloat16: {weights / 1e6:,.1f} MB; quantized ones are fewer" in lines
    (row,) = [line for line in lines if line.split()[:2] == ["4", "4.00"]]
    groups = int(row.split()[-1])
    width = 512 // groups
    sizes = [3 * 2 * groups * (width * (width + 1) * size + width * 4) for size in (4, 2)]
    bases = next(size for size in sizes if size <= max(0.03 * weights, 2**20))
    assert row.endswith(f"{bases / 1e6:,.1f} MB  {bases / weights:>10.1%}  {groups:>11}")


def written(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON that can be read"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        ('{"model_type": "no_such_model"}', "model_type='no_such_model' is none that transformers"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    for path in (written(tmp_path, text), tmp_path / "config.json"):
        with pytest.raises(ValueError, match=message) as caught:
            inspect_lines(path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_missing_and_a_folder_without_a_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; pass a local model folder or its config"):
        inspect_lines(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="; pass a local transformers model folder"):
        inspect_lines(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(bytes([0xFF, 0xFE]) * 9)
    with pytest.raises(ValueError, match="is no JSON that can be read"):
        inspect_lines(tmp_path / "weights.safetensors")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=2), "T5"),
        (MambaConfig(**SMALL), "has no KV cache|no decoder-only KV cache"),
        (ViTConfig(**SMALL), "ViTConfig belongs to no model that generates text"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_a_config_without_a_cache_to_pack_is_named(config, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        inspect_lines(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] and str(tmp_path) in str(caught.value)
