"""Plans in files: what goes in comes out, anything else is refused, and a loaded plan decodes as the one it was saved from."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile import AttentionPackConfig, Plan
from apack_compile.codec import Bands, StreamBasis
from apack_compile.importance import CoarseRule
from apack_compile.plan import FITTED_SCOPES, LayerPlan, Provenance, StreamPlan, attentionpack_plan, lossless_plan
from apack_compile.plan_file import FORMAT_VERSION, digest, tensors_of, values_of, versions
from apack_compile.rotary import KeyTurn

IMAGE = 9
RATIO = 3
HEADS, HEAD_DIM, LAYERS = 2, 16, 2
SIGNATURE = (LAYERS, HEADS, HEAD_DIM, "torch.float32")


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": HEADS * HEAD_DIM * 2,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2 * HEADS,
        "num_key_value_heads": HEADS,
    }
    config = LlamaConfig(**{**sizes, **changes})
    config.image_token_id = IMAGE
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(seed: int, vision: int = 90) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 64, (1, 240), generator=torch.Generator().manual_seed(seed))
    ids[0, 20 : 20 + vision] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def calibrated() -> LlamaForCausalLM:
    model = apack_compile.optimize(llama(), ratio=RATIO, compile="none")
    return apack_compile.calibrate(model, [prompt(1), prompt(2)])


@pytest.fixture(scope="module")
def plan(calibrated) -> Plan:
    return apack_compile.plan_for(calibrated, 240, 0.375)


@pytest.fixture(scope="module")
def coarse_plan() -> Plan:
    model = apack_compile.optimize(llama(), ratio=6, compile="none")
    apack_compile.calibrate(model, [prompt(1), prompt(2), prompt(3)])
    plan = apack_compile.plan_for(model, 240, 0.375)
    assert plan.coarse is not None
    return plan


@pytest.fixture
def saved(plan, tmp_path) -> Path:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    return path


def assert_equal(found: Plan, expected: Plan) -> None:
    others = {"bases": {}, "provenance": Provenance(), "turn": None, "coarse": None}
    assert replace(found, **others) == replace(expected, **others)
    assert (found.coarse is None) == (expected.coarse is None)
    if expected.coarse is not None:
        assert (found.coarse.modality, found.coarse.share) == (expected.coarse.modality, expected.coarse.share)
        assert set(found.coarse.weights) == set(expected.coarse.weights)
        assert all(torch.equal(w, expected.coarse.weights[i]) for i, w in found.coarse.weights.items())
    assert (found.turn is None) == (expected.turn is None)
    if expected.turn is not None:
        assert (found.turn.block, found.turn.interleaved) == (expected.turn.block, expected.turn.interleaved)
        assert torch.equal(found.turn.frequencies, expected.turn.frequencies)
        assert (found.turn.coordinates is None) == (expected.turn.coordinates is None)
    assert found.provenance.calibrated_on == expected.provenance.calibrated_on
    assert set(found.bases) == set(expected.bases)
    for layer, bases in expected.bases.items():
        for one, other in zip(found.bases[layer], bases, strict=True):
            for tensor, wanted in zip(one, other, strict=True):
                assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a basis owns no more than it needs"


def write(path: Path, values: dict, tensors: dict[str, torch.Tensor], version: str = FORMAT_VERSION) -> None:
    """A file whose checksum is right, whatever it says."""
    text = json.dumps(values)
    save_file(tensors, path, {"apack_plan": version, "plan": text, "sha256": digest(text, tensors)})


COUNTS = st.tuples(*[st.integers(0, 2)] * 4).filter(any)


@st.composite
def plans(draw) -> Plan:
    scope = draw(st.sampled_from(("as_is", "model", "mixed", "sequence", "batch")))
    groups, width = draw(st.integers(1, 3)), 8
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def stream() -> tuple[StreamPlan, StreamBasis]:
        own = draw(st.sampled_from(("as_is", "model"))) if scope == "mixed" else scope
        empty = StreamBasis(*(torch.empty(0) for _ in range(3)))
        if own == "as_is":
            return StreamPlan(own), empty
        bands = Bands(draw(COUNTS)) if own == "model" else Bands((draw(st.integers(1, 9)), 0, 0, 0))
        if own in FITTED_SCOPES:
            return StreamPlan(own, bands), empty
        shapes = (1, groups, width), (1, groups, bands.components, width), (1, groups, bands.components)
        basis = StreamBasis(*(torch.rand(shape, generator=generator) + 0.1 for shape in shapes))
        return StreamPlan(own, bands, draw(st.booleans())), basis

    tells_apart = scope == "model" and draw(st.booleans())
    layers, bases = {}, {}
    for layer in draw(st.sets(st.integers(0, 5), min_size=1, max_size=3)):
        streams = [stream() for _ in range(6 if tells_apart else 4)]
        layers[layer] = LayerPlan(*(part for part, _ in streams))
        if any(part.scope == "model" for part, _ in streams):
            order = (4, 5, 0, 1, 2, 3) if tells_apart else range(4)
            bases[layer] = tuple(streams[i][1] for i in order)
    weights = {layer: torch.rand(2 * groups * width + 2 * 2, generator=generator) for layer in layers}
    turn = None
    if scope == "model" and draw(st.booleans()):
        turn = KeyTurn(torch.rand(draw(st.integers(1, 4)), generator=generator), 16, interleaved=draw(st.booleans()))
    return Plan(
        layers,
        draw(st.integers(32 if scope in FITTED_SCOPES else 0, 64)),
        draw(st.integers(0, 8)),
        groups,
        bases,
        draw(st.booleans()),
        (6, 2, 8, "torch.bfloat16"),
        Provenance(draw(st.none() | st.text())),
        turn=turn,
        coarse=CoarseRule(draw(st.sampled_from(("vision", "text"))), 0.6, weights) if tells_apart else None,
    )


@given(plans())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("plans") / "plan"
    made.save(path)
    found = Plan.load(path)
    assert_equal(found, made)
    assert found.provenance.versions == versions() and found.provenance.path == str(path)
    assert os.listdir(path.parent) == ["plan"]


def decoded(model: LlamaForCausalLM, tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, and the logits they were chosen by."""
    out = model.generate(
        **prompt(7), max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits)


def test_a_loaded_plan_decodes_as_the_calibrated_model_and_holds_the_same(calibrated, saved):
    model = apack_compile.optimize(llama(), plan=Plan.load(saved), compile="none")
    (tokens, logits), (expected, expected_logits) = decoded(model), decoded(calibrated)
    assert torch.equal(tokens, expected) and torch.equal(logits, expected_logits)
    assert apack_compile.report(model).bytes == apack_compile.report(calibrated).bytes
    assert not torch.equal(logits, decoded(llama())[1]), "the plan is lossy, so the logits show that it is used"


def test_every_prompt_gets_the_given_plan_and_the_plan_can_be_saved_again(plan, saved, tmp_path):
    model = apack_compile.optimize(llama(), plan=Plan.load(saved), compile="none")
    assert apack_compile.plan_for(model, 10) is apack_compile.plan_for(model, 9000, 1.0)
    apack_compile.plan_for(model, 10).save(tmp_path / "again")
    assert_equal(Plan.load(tmp_path / "again"), plan)
    with pytest.raises(ValueError, match=r"optimized with a plan.*call optimize\(model, ratio"):
        apack_compile.calibrate(model, prompt(1))
    apack_compile.optimize(model, ratio=RATIO, compile="none")
    apack_compile.calibrate(model, prompt(1))
    assert apack_compile.report(model).setting == "ratio=3"


@pytest.mark.parametrize("preset", ("lossless", "attentionpack"))
def test_the_plan_of_a_preset_is_saved_too(preset, tmp_path):
    ranks = dict.fromkeys(AttentionPackConfig().ranks, 12)
    model = apack_compile.optimize(llama(), AttentionPackConfig(preset=preset, ranks=ranks, compile="none"))
    expected = decoded(model)[1]
    apack_compile.plan_for(model, 240).save(tmp_path / "plan")
    apack_compile.optimize(model, plan=Plan.load(tmp_path / "plan"), compile="none")
    assert torch.equal(decoded(model)[1], expected)
    assert apack_compile.report(model).calibrated_on is None


def test_the_report_names_the_file_what_it_was_calibrated_on_and_other_versions(plan, saved):
    model = apack_compile.optimize(llama(), plan=Plan.load(saved), compile="none")
    report = apack_compile.report(model)
    assert report.setting == f"plan=Plan.load({str(saved)!r})" and report.calibrated_on == "calibrate"
    assert f"{saved}" in str(report) and "bases calibrated on: calibrate" in str(report) and not report.notes
    assert f"append: {report.operations['append']}; unpack: {report.operations['unpack']}; attend: " in str(report)
    older = {**versions(), "torch": "2.11.0"}
    replace(plan, provenance=replace(plan.provenance, versions=older)).save(saved)
    apack_compile.optimize(model, plan=Plan.load(saved), compile="none")
    (note,) = apack_compile.report(model).notes
    assert note == f"the plan was made with other versions: torch 2.11.0, here {versions()['torch']}"
    apack_compile.optimize(model, plan=plan, compile="none")
    assert apack_compile.report(model).setting == "plan=Plan, not loaded from a file"


def test_a_loaded_plan_does_not_change_with_its_file(plan, saved):
    loaded = Plan.load(saved)
    size = saved.stat().st_size
    with saved.open("r+b") as file:
        file.write(bytes(size))
    assert_equal(loaded, plan)


def test_the_bases_of_a_plan_move_to_the_device_of_the_model(plan, monkeypatch):
    model = llama()
    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device("meta"))
    moved = apack_compile.plan_for(apack_compile.optimize(model, plan=plan, compile="none"), 100)
    assert {tensor.device.type for bases in moved.bases.values() for basis in bases for tensor in basis} == {"meta"}
    assert moved.layers == plan.layers and moved.signature == plan.signature


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 4}, "plan and ratio=4 exclude each other"),
        ({"preset": "lossless"}, "plan and preset='lossless' exclude each other"),
        ({"config": AttentionPackConfig()}, r"plan and config=AttentionPackConfig\(ratio=4.*exclude each other"),
        ({"plan": "plan.safetensors"}, r"plan='plan\.safetensors' must be a Plan; Plan\.load\(path\) reads one"),
        ({"compile": "fast"}, "compile='fast'"),
    ],
)
def test_a_plan_excludes_other_settings_and_a_bad_argument_changes_nothing(plan, arguments, message):
    model = apack_compile.optimize(llama(), preset="lossless", compile="none")
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(model, **{"plan": plan, **arguments})
    assert apack_compile.report(model).setting == "preset='lossless'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"plan: made for 2 layers, 2 KV heads x 16.*; the model has 3 layers, 2 KV heads"),
        ({"num_key_value_heads": 4}, "the model has 2 layers, 4 KV heads x 16"),
        ({"head_dim": 8}, "the model has 2 layers, 2 KV heads x 8"),
        ({"dtype": torch.bfloat16}, r"made for .* torch\.float32; .*torch\.bfloat16"),
    ],
)
def test_a_plan_of_another_model_is_refused(plan, changes, message):
    dtype = changes.pop("dtype", torch.float32)
    model = llama(**changes).to(dtype)
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(model, plan=plan)
    assert not any(name in vars(model) for name in ("generate", "_apack_session"))


def test_a_plan_without_a_signature_or_of_other_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"plan: signature is \(\), must be .*plan_for"):
        apack_compile.optimize(llama(), plan=lossless_plan([0, 1]))
    with pytest.raises(ValueError, match=r"plan: signature is \(\)"):
        lossless_plan([0, 1]).save(tmp_path / "plan")
    with pytest.raises(ValueError, match=r"plan: packs the layers \[1\]; of this model \[0, 1\] are packed"):
        apack_compile.optimize(llama(), plan=replace(lossless_plan([1]), signature=SIGNATURE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "tokens=0 must be an integer >= 1"),
        ((1.5,), r"tokens=1\.5"),
        ((True,), "tokens=True"),
        ((9, 1.5), r"vision_share=1\.5"),
        ((9, float("nan")), "vision_share=nan must be a number from 0 to 1"),
    ],
)
def test_plan_for_names_a_bad_argument(calibrated, arguments, message):
    with pytest.raises(ValueError, match=message):
        apack_compile.plan_for(calibrated, *arguments)


def test_plan_for_needs_an_optimized_and_calibrated_model():
    with pytest.raises(ValueError, match=r"call apack_compile\.optimize"):
        apack_compile.plan_for(llama(), 100)
    with pytest.raises(RuntimeError, match="no calibrated statistics yet"):
        apack_compile.plan_for(apack_compile.optimize(llama(), ratio=RATIO), 100)


def test_a_missing_file_and_a_folder(plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Plan.load(tmp_path / "absent")
    for call in (Plan.load, plan.save):
        with pytest.raises(ValueError, match=r"path='.*' is a folder; a plan is one file"):
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
    with pytest.raises(ValueError, match=r"path='.*': plan format '1'; apack-compile .* reads format '4'"):
        Plan.load(tmp_path / "plan")


NAME = "layers.1.text_value"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mean", lambda t: t.half(), r"layer 1 text_value mean dtype is torch\.float16, must be torch\.float32"),
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
        (stream_change(bands=[0, -1, 3, 0]), "must be four integers >= 0"),
        (stream_change(bands=[0, 1.0, 0, 0]), "must be four integers >= 0"),
        (stream_change(bands=[1, 2, 3]), "must be four integers >= 0"),
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
        (lambda values: values["layers"][1].update(layer=0), "not laid out as plan format 4"),
        (lambda values: values["layers"][1].update(layer=[1]), "not laid out as plan format 4"),
        (lambda values: values["turn"].update(block=0), "turn block is 0, must be an integer >= 1"),
        (lambda values: values["turn"].update(block="32"), "turn block is '32'"),
        (lambda values: values["turn"].update(interleaved=1), "turn interleaved is 1, must be True or False"),
        (lambda values: values["turn"].pop("interleaved"), "more than a plan"),
        (lambda values: values.update(turn=None), "more than a plan"),
        (lambda values: values["turn"].pop("block"), "not laid out"),
        (lambda values: values["layers"].pop(), "not laid out as plan format 4 says: .*more than a plan"),
        (lambda values: values.pop("groups"), "not laid out as plan format 4 says: KeyError"),
        (lambda values: values.update(more=1), "more than a plan"),
        (lambda values: values.update(layers=None), "not laid out"),
        (lambda values: values.update(versions=[]), "not laid out"),
        (lambda values: values.update(versions={"torch": 2}), "versions is .*object of strings"),
        (lambda values: values.update(calibrated_on=3), "calibrated_on is 3"),
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
        (torch.tensor([0, 1, 2]), r"turn coordinates shape is \(3,\), must be \(8,\)"),
        (torch.zeros(8), "turn coordinates dtype is torch.float32, must be torch.int64"),
        (torch.full((8,), -1), r"turn coordinate is \(-1, -1\), must be from 0 to 7"),
        (torch.tensor([0] * 7 + [8]), r"turn coordinate is \(0, 8\), must be from 0 to 7"),
    ],
)
def test_coordinates_that_make_no_plan_are_refused(plan, tmp_path, coordinates, message):
    path = tmp_path / "plan"
    write(path, values_of(plan), {**tensors_of(plan), "turn.coordinates": coordinates})
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def test_coordinates_without_a_turn_are_refused(plan, tmp_path):
    still = replace(plan, turn=None)
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


def test_a_plan_that_tells_tokens_apart_decodes_as_the_one_it_was_saved_from(calibrated, coarse_plan, tmp_path):
    coarse_plan.save(tmp_path / "plan")
    made, loaded = (
        decoded(apack_compile.optimize(llama(), plan=p, compile="none"))
        for p in (coarse_plan, Plan.load(tmp_path / "plan"))
    )
    assert torch.equal(made[0], loaded[0]) and torch.equal(made[1], loaded[1])


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
    ranks = dict.fromkeys(AttentionPackConfig().ranks, 4)
    short = replace(attentionpack_plan([0, 1], ranks, tail_slots=8), signature=SIGNATURE)
    with pytest.raises(ValueError, match="plan: tail_slots is 8, must be >= 32"):
        short.save(tmp_path / "plan")
    with pytest.raises(ValueError, match=r"plan: layers with bases is \[\], must be \[0, 1\]"):
        replace(plan, bases={}).save(tmp_path / "plan")
    wide = {i: (b[0], b[1], b[2], StreamBasis(*(t.double() for t in b[3]))) for i, b in plan.bases.items()}
    with pytest.raises(ValueError, match=r"plan: layer 0 text_value mean dtype is torch\.float64"):
        apack_compile.optimize(llama(), plan=replace(plan, bases=wide))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ("os.replace", "pathlib.Path.write_bytes"))
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


def test_a_plan_file_is_readable_as_any_new_file_and_holds_no_pickle(saved):
    beside = saved.with_name("beside")
    beside.touch()
    assert saved.stat().st_mode == beside.stat().st_mode
    with safe_open(saved, "pt") as file:
        assert set(file.metadata()) == {"apack_plan", "plan", "sha256"}
