"""Files that are no plan, or no plan that a cache can use, are refused and change nothing."""

import copy
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from saved_plans import SIGNATURE, llama, write

import apack_compile
from apack_compile import AttentionPackConfig, Plan
from apack_compile.kernels.format import StreamBasis
from apack_compile.plan.file import tensors_of, values_of
from apack_compile.plan.presets.attentionpack import attentionpack_plan


def test_a_missing_file_and_a_folder(plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Plan.load(tmp_path / "absent")
    for call in (Plan.load, plan.save):
        with pytest.raises(ValueError, match=r"path='.*' is a folder; pass a file"):
            call(tmp_path)
    with pytest.raises(FileNotFoundError):
        plan.save(tmp_path / "absent" / "plan")
    assert os.listdir(tmp_path) == []


def test_a_truncated_file_is_refused(saved):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header, header + 1, (header + len(content)) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"path='{saved}'.*not a whole safetensors file"):
            Plan.load(saved)


@pytest.mark.parametrize("flip", (0x01, 0x20, 0xFF))
def test_no_flipped_byte_goes_unnoticed(saved, flip, plan):
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in (*range(0, header, 7), *range(header, len(content), 997)):
        saved.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
        with pytest.raises(ValueError, match=f"path='{saved}'"):
            Plan.load(saved)


@pytest.mark.parametrize("content", (b"not a plan", b"\x80\x04}.", b"{}" * 100))
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "plan"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Plan.load(path)
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"a safetensors file, but not one that Plan\.save wrote"):
        Plan.load(path)
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Plan.load(path)


def test_a_file_of_another_format_version_is_refused(plan, tmp_path):
    write(tmp_path / "plan", values_of(plan), tensors_of(plan), version="1")
    with pytest.raises(ValueError, match=r"path='.*': plan format '1'; apack-compile .* reads the formats 4, 5, 6, 7"):
        Plan.load(tmp_path / "plan")


NAME = "layers.1.text_value"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mean", lambda t: t.double(), r"mean dtype is torch\.float64, must be torch\.float32 or torch\.float16"),
        ("decoder", lambda t: t.half(), r"text_value decoder dtype is torch\.float16, must be torch\.float32"),
        ("mean", lambda t: t[0], r"text_value mean shape is \(1, 32\), must be \(1, 1, W\)"),
        ("mean", lambda t: t[..., :-1], r"bands is \(0, 16, 16, 0\), must be at most the basis' 31 components"),
        ("decoder", lambda t: t[:, :, 1:], "text_value decoder shape"),
        ("decoder", lambda t: t.index_fill(2, torch.tensor([0]), torch.nan), "decoder is 'NaN or Inf.*must be finite"),
        ("mean", lambda t: t + torch.inf, "mean is 'NaN or Inf"),
        ("step", lambda t: t[..., 1:], "text_value step shape"),
        ("step", lambda t: -t, "text_value step is -.*must be > 0"),
        ("step", lambda t: t.double(), "step dtype"),
    ],
)
def test_tensors_that_a_cache_cannot_use_are_refused(plan, tmp_path, part, change, message):
    path, tensors = tmp_path / "plan", tensors_of(plan)
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"]).contiguous()
    write(path, values_of(plan), tensors)
    with pytest.raises(ValueError, match=rf"path='{path}': layer 1 .*{message.removeprefix('layer 1 ')}"):
        Plan.load(path)


def test_one_width_for_text_another_for_vision_is_refused(plan, tmp_path):
    path, values, tensors = tmp_path / "plan", values_of(plan), tensors_of(plan)
    values["layers"][1]["text_value"]["bands"] = [0, 16, 0, 0]
    cuts = {"mean": (..., slice(24)), "decoder": (..., slice(16), slice(24)), "step": (..., slice(16))}
    for name, cut in cuts.items():
        tensors[f"{NAME}.{name}"] = tensors[f"{NAME}.{name}"][cut].contiguous()
    write(path, values, tensors)
    with pytest.raises(
        ValueError, match=r"layer 1 mean of vision_value is \(1, 1, 32\), must be that of text, \(1, 1, 24\)"
    ):
        Plan.load(path)


def stream_change(**changes):
    return lambda values: values["layers"][1]["text_value"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stream_change(bands=[0, 1, 0, 0]), "text_value decoder shape is .* for the bands"),
        (stream_change(bands=[0, 33, 0, 0]), r"bands is \(0, 33, 0, 0\), must be at most the basis' 32 components"),
        (stream_change(bands=[0, -1, 3, 0]), "must be 4 integers >= 0"),
        (stream_change(bands=[0, 1.0, 0, 0]), "must be 4 integers >= 0"),
        (stream_change(bands=[1, 2, 3]), "must be 4 integers >= 0"),
        (stream_change(scope="as_is", token_scale=False), "bands is .* kept as it is"),
        (stream_change(scope="as_is", token_scale=False, bands=[0] * 4), "basis is .* must be empty"),
        (stream_change(scope="other"), "scope is 'other', must be one of as_is, half, sequence, batch, model"),
        (stream_change(scope=["model"]), r"scope is \['model'\]"),
        (stream_change(token_scale=1), "token_scale is 1, must be True or False"),
        (lambda values: values.update(tail_slots=-1), "tail_slots is -1"),
        (lambda values: values.update(first_tokens=True), "first_tokens is True"),
        (lambda values: values.update(groups=0), "groups is 0"),
        (lambda values: values.update(groups=2), r"mean shape is \(1, 1, 32\), must be \(1, 2, W\)"),
        (lambda values: values.update(separates_vision="no"), "separates_vision is 'no'"),
        (lambda values: values.update(signature=[2, 2, 16]), "signature is"),
        (lambda values: values.update(signature=[1, 2, 16, "torch.float32"]), r"layers is \[0, 1\], must be .* 0 to 0"),
        (lambda values: values["layers"][1].update(layer=0), "not laid out as plan format 7"),
        (lambda values: values["layers"][1].update(layer=[1]), "not laid out as plan format 7"),
        (lambda values: values["turn"].update(block=0), "rotation block is 0, must be an integer >= 1"),
        (lambda values: values["turn"].update(block="32"), "rotation block is '32'"),
        (lambda values: values["turn"].update(interleaved=1), "rotation interleaved is 1, must be True or False"),
        (lambda values: values["turn"].pop("interleaved"), "more than a plan"),
        (lambda values: values.update(rotation=None), "more than a plan"),
        (lambda values: values["turn"].pop("block"), "not laid out"),
        (lambda values: values["layers"].pop(), "not laid out as plan format 7 says: .*more than a plan"),
        (lambda values: values.pop("groups"), "not laid out as plan format 7 says: KeyError"),
        (lambda values: values.update(more=1), "more than a plan"),
        (lambda values: values.update(layers=None), "not laid out"),
        (lambda values: values.update(versions=[]), "not laid out"),
        (lambda values: values.update(versions={"torch": 2}), "versions is .*object of strings"),
        (lambda values: values.update(calibrated_on=3), "calibrated_on is 3"),
        (lambda values: values.update(plan_id=3), "plan_id is 3"),
        (lambda values: values.pop("plan_id"), "KeyError"),
    ],
)
def test_values_that_make_no_plan_are_refused(plan, tmp_path, change, message):
    path, values = tmp_path / "plan", copy.deepcopy(values_of(plan))
    change(values)
    write(path, values, tensors_of(plan))
    with pytest.raises(ValueError, match=rf"path='{path}': .*{message}"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        (torch.tensor([0, 1, 2]), r"rotation coordinates shape is \(3,\), must be \(8,\)"),
        (torch.zeros(8), "rotation coordinates dtype is torch.float32, must be torch.int64"),
        (torch.full((8,), -1), r"rotation coordinate is \(-1, -1\), must be from 0 to 7"),
        (torch.tensor([0] * 7 + [8]), r"rotation coordinate is \(0, 8\), must be from 0 to 7"),
    ],
)
def test_coordinates_that_make_no_plan_are_refused(plan, tmp_path, coordinates, message):
    path = tmp_path / "plan"
    write(path, values_of(plan), {**tensors_of(plan), "turn.coordinates": coordinates})
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def test_coordinates_without_a_rotation_are_refused(plan, tmp_path):
    still = replace(plan, rotation=None)
    write(tmp_path / "plan", values_of(still), {**tensors_of(still), "turn.coordinates": torch.zeros(8).long()})
    with pytest.raises(ValueError, match="more than a plan"):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values: values["coarse"].update(modality="sound"),
            "coarse modality is 'sound', must be one of vision, text",
        ),
        (lambda values: values["coarse"].update(share=1.0), "coarse share is 1.0, must be a number between 0 and 1"),
        (lambda values: values["coarse"].update(share="half"), "coarse share is 'half'"),
        (lambda values: values["coarse"].pop("share"), "not laid out"),
        (lambda values: values.update(coarse=None), "more than a plan"),
        (lambda values: values["layers"][1].pop("coarse_key"), "not laid out|more than a plan"),
    ],
)
def test_a_rule_that_makes_no_plan_is_refused(coarse_plan, tmp_path, change, message):
    path, values = tmp_path / "plan", copy.deepcopy(values_of(coarse_plan))
    change(values)
    write(path, values, tensors_of(coarse_plan))
    with pytest.raises(ValueError, match=rf"path='{path}': .*({message})"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(67), r"layer 1 coarse weights shape is \(67,\), must be \(68,\)"),
        (torch.ones(68).double(), "layer 1 coarse weights dtype is torch.float64"),
        (torch.full((68,), torch.nan), "layer 1 coarse weights is 'NaN or Inf somewhere'"),
    ],
)
def test_weights_that_fit_no_token_are_refused(coarse_plan, tmp_path, weights, message):
    write(tmp_path / "plan", values_of(coarse_plan), {**tensors_of(coarse_plan), "coarse.1": weights})
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan")


def test_tensors_too_many_or_too_few_are_refused(plan, tmp_path):
    path, tensors = tmp_path / "plan", tensors_of(plan)
    write(path, values_of(plan), {**tensors, "more": torch.ones(1)})
    with pytest.raises(ValueError, match="more than a plan"):
        Plan.load(path)
    tensors.pop(f"{NAME}.mean")
    write(path, values_of(plan), tensors)
    with pytest.raises(ValueError, match=rf"KeyError\('{NAME}\.mean'\)"):
        Plan.load(path)


def test_a_plan_that_no_cache_can_use_is_not_saved(plan, tmp_path):
    ranks = dict.fromkeys(AttentionPackConfig(min_tokens=0).ranks, 4)
    short = replace(attentionpack_plan([0, 1], ranks, tail_slots=8), signature=SIGNATURE)
    with pytest.raises(ValueError, match="plan: tail_slots is 8, must be >= 32"):
        short.save(tmp_path / "plan")
    with pytest.raises(ValueError, match=r"plan: layers with bases is \[\], must be \[0, 1\]"):
        replace(plan, bases={}).save(tmp_path / "plan")
    wide = {i: (b[0], b[1], b[2], StreamBasis(*(t.double() for t in b[3]))) for i, b in plan.bases.items()}
    with pytest.raises(ValueError, match=r"plan: layer 0 text_value mean dtype is torch\.float64"):
        apack_compile.optimize(llama(), plan=replace(plan, bases=wide))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ("os.replace", "pathlib.Path.chmod"))
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(plan, saved, monkeypatch, failing):
    before = saved.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        with pytest.raises(OSError, match="disk full"):
            replace(plan, tail_slots=5).save(saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]
    replace(plan, tail_slots=5).save(saved)
    assert Plan.load(saved).tail_slots == 5
