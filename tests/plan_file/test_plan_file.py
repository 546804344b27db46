"""Plans in files: what goes in comes out, anything else is refused, and a loaded plan decodes as the one it was saved from."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from saved_plans import RATIO, SIGNATURE, assert_equal, decoded, llama, prompt
from transformers import LlamaForCausalLM

import apack_compile
from apack_compile import AttentionPackConfig, Plan
from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.plan.coarse_rule import CoarseRule
from apack_compile.plan.file import versions
from apack_compile.plan.plan import FITTED_SCOPES, LayerPlan, Provenance, StreamPlan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.rotation import KeyRotation

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
    rotation = None
    if scope == "model" and draw(st.booleans()):
        rotation = KeyRotation(
            torch.rand(draw(st.integers(1, 4)), generator=generator), 16, interleaved=draw(st.booleans())
        )
    return Plan(
        layers,
        draw(st.integers(32 if scope in FITTED_SCOPES else 0, 64)),
        draw(st.integers(0, 8)),
        groups,
        bases,
        draw(st.booleans()),
        (6, 2, 8, "torch.bfloat16"),
        Provenance(draw(st.none() | st.text())),
        rotation=rotation,
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
    apack_compile.optimize(model, ratio=RATIO, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt(1))
    assert apack_compile.report(model).setting == "ratio=3"


@pytest.mark.parametrize("preset", ("lossless", "attentionpack"))
def test_the_plan_of_a_preset_is_saved_too(preset, tmp_path):
    ranks = dict.fromkeys(AttentionPackConfig(min_tokens=0).ranks, 12)
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
    older = {**versions(), "torch": "2.10.0"}
    replace(plan, provenance=replace(plan.provenance, versions=older)).save(saved)
    apack_compile.optimize(model, plan=Plan.load(saved), compile="none")
    (note,) = apack_compile.report(model).notes
    assert note == f"the plan was made with other versions: torch 2.10.0, here {versions()['torch']}"
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
        (
            {"config": AttentionPackConfig(min_tokens=0)},
            r"plan and config=AttentionPackConfig\(ratio=4.*exclude each other",
        ),
        ({"plan": "plan.safetensors"}, r"plan='plan\.safetensors' must be a Plan; Plan\.load\(path\) reads one"),
        ({"compile": "fast"}, "compile='fast'"),
    ],
)
def test_a_plan_excludes_other_settings_and_a_bad_argument_changes_nothing(plan, arguments, message):
    model = apack_compile.optimize(llama(), preset="lossless", compile="none")
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(model, **{"plan": plan, **arguments}, min_tokens=0)
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
        apack_compile.plan_for(apack_compile.optimize(llama(), ratio=RATIO, min_tokens=0), 100)


def test_a_plan_that_tells_tokens_apart_decodes_as_the_one_it_was_saved_from(calibrated, coarse_plan, tmp_path):
    coarse_plan.save(tmp_path / "plan")
    made, loaded = (
        decoded(apack_compile.optimize(llama(), plan=p, compile="none"))
        for p in (coarse_plan, Plan.load(tmp_path / "plan"))
    )
    assert torch.equal(made[0], loaded[0]) and torch.equal(made[1], loaded[1])


def test_a_plan_file_is_readable_as_any_new_file_and_holds_no_pickle(saved):
    beside = saved.with_name("beside")
    beside.touch()
    assert saved.stat().st_mode == beside.stat().st_mode
    with safe_open(saved, "pt") as file:
        assert set(file.metadata()) == {"apack_plan", "plan", "sha256"}
