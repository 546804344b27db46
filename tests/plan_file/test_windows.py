"""Plans of models whose layers see only the newest tokens: one file has those of all layers."""

import copy
from dataclasses import replace

import pytest
import torch
from saved_plans import WINDOW, WINDOWED, assert_equal, prompt, sampled, windowed, write
from transformers import GenerationConfig, StaticCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

import apack_compile
from apack_compile import AttentionPackConfig, Plan
from apack_compile.kernels.linear.cpu import onednn_is_faster
from apack_compile.plan.check import check_plan
from apack_compile.plan.file import tensors_of, values_of

TOKENS = 3 * WINDOW


@pytest.fixture(scope="module", params=WINDOWED)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def calibrated(kind):
    model = apack_compile.optimize(windowed(kind), ratio=3, compile="none", min_tokens=0)
    return apack_compile.calibrate(model, prompt(1, vision=0))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of a layer that sees every token, and two that do not."""
    model = apack_compile.optimize(windowed("one full"), ratio=3, compile="none", min_tokens=0)
    return apack_compile.plan_for(apack_compile.calibrate(model, prompt(1, vision=0)), TOKENS)


def test_a_loaded_plan_decodes_as_the_calibrated_model_and_leaves_no_layer_dense(kind, calibrated, tmp_path):
    made = apack_compile.plan_for(calibrated, TOKENS)
    assert set(made.by_window) == ({WINDOW} if kind == "all sliding" else {None, WINDOW})
    assert made.every_layer == [0, 1, 2]
    made.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert_equal(loaded, made)
    expected, held = sampled(calibrated), apack_compile.report(calibrated).bytes
    for compile in ("none", "eager"):
        model = apack_compile.optimize(windowed(kind), plan=loaded, compile=compile)
        found = sampled(model)
        same = apack_compile.optimize(windowed(kind), plan=made, compile=compile)
        assert all(map(torch.equal, found, sampled(same)))
        # a rounding of oneDNN's sums can turn one code into the next
        exact = compile == "none" or not onednn_is_faster()
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if exact else 1e-3)
        report = apack_compile.report(model)
        assert {line.status for line in report.layers} == {"packed" if compile == "none" else "rewritten"}
        assert report.bytes == held and report.keys and not report.notes
    assert not torch.equal(sampled(windowed(kind))[1], expected[1]), "the plan is lossy, so the logits show it is used"


@pytest.mark.parametrize("preset", ["lossless", "a-vl"])
def test_the_plan_of_a_preset_is_that_of_all_layers(kind, preset, tmp_path):
    model = apack_compile.optimize(windowed(kind), preset=preset, compile="none")
    expected = sampled(model)
    apack_compile.plan_for(model, TOKENS).save(tmp_path / "plan")
    model = apack_compile.optimize(windowed(kind), plan=Plan.load(tmp_path / "plan"), compile="none")
    assert all(map(torch.equal, sampled(model), expected))
    assert {line.status for line in apack_compile.report(model).layers} == {"packed"}


def test_a_cache_made_by_hand_and_a_plan_saved_again_have_all_windows(plan, tmp_path):
    plan.save(tmp_path / "plan")
    model = apack_compile.optimize(windowed("one full"), plan=Plan.load(tmp_path / "plan"), compile="none")
    cache = apack_compile.new_cache(model)
    model.generate(torch.arange(2, 42)[None], max_new_tokens=3, past_key_values=cache)
    assert [(group.window, group.index.plan.every_layer) for group in cache.groups] == [
        (None, [0, 1, 2]),
        (WINDOW, [0, 1]),
    ]
    apack_compile.plan_for(model, 10).save(tmp_path / "again")
    assert_equal(Plan.load(tmp_path / "again"), plan)
    assert "full attention: rotated back" in apack_compile.report(model).keys


def test_files_of_earlier_formats_load_as_they_did(plan, tmp_path):
    first = replace(plan, windows={})
    values = {name: value for name, value in values_of(first).items() if name not in ("window", "windows", "plan_id")}
    write(tmp_path / "plan", values, tensors_of(first), version="4")
    assert_equal(Plan.load(tmp_path / "plan"), first)
    model = apack_compile.optimize(windowed("one full"), plan=Plan.load(tmp_path / "plan"), compile="none")
    sampled(model)
    reasons = [line.reason for line in apack_compile.report(model).layers if line.status == "dense"]
    why = "the plan given has no streams for it; plan_for gives one with those of all layers"
    assert reasons == [f"sliding_attention: {why}"] * 2
    # an earlier file of a model whose layers all have one window does not say so
    sliding = apack_compile.optimize(windowed("all sliding"), preset="lossless", compile="none")
    made = apack_compile.plan_for(sliding, TOKENS)
    values = {name: value for name, value in values_of(made).items() if name not in ("window", "windows", "plan_id")}
    write(tmp_path / "plan", values, tensors_of(made), version="4")
    apack_compile.optimize(windowed("all sliding"), plan=Plan.load(tmp_path / "plan"), compile="none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("windows"), "not laid out as plan format 7 says: KeyError"),
        (lambda values: values.pop("window"), "not laid out as plan format 7 says: KeyError"),
        (lambda values: values.update(windows=[]), "not laid out as plan format 7"),
        (lambda values: values.update(windows={}), "more than a plan"),
        (lambda values: values["windows"].update({"020": values["windows"].pop("20")}), "not laid out"),
        (lambda values: values["windows"].update(wide=values["windows"].pop("20")), "not laid out"),
        (lambda values: values["windows"].update({"9": values["windows"]["20"]}), "not laid out"),
        (lambda values: values["windows"]["20"].update(window=21), "window 20 window is 21, must be 20"),
        (lambda values: values["windows"]["20"].update(window=None), "window 20 window is None, must be 20"),
        (lambda values: values.update(window=20), "window 20 window is 20, must be 20, and not that of the other layers"),
        (lambda values: values.update(window=0), "window is 0, must be an integer >= 1, or None"),
        (lambda values: values["windows"]["20"].update(tail_slots=-1), "window 20 tail_slots is -1"),
        (lambda values: values["windows"]["20"].update(signature=[3, 2, 8, "torch.float32"]), "window 20 signature is"),
        (lambda values: values["windows"]["20"]["layers"].pop(), "more than a plan"),
        (
            lambda values: values["windows"]["20"].update(windows={"9": copy.deepcopy(values["windows"]["20"])}),
            "not laid out as plan format 7",
        ),
    ],
)  # fmt: skip
def test_windows_that_make_no_plan_are_refused(plan, tmp_path, change, message):
    path, values = tmp_path / "plan", copy.deepcopy(values_of(plan))
    change(values)
    write(path, values, tensors_of(plan))
    with pytest.raises(ValueError, match=rf"path='{path}': .*{message}"):
        Plan.load(path)


def test_tensors_of_a_window_that_a_cache_cannot_use_are_refused(plan, tmp_path):
    path, tensors = tmp_path / "plan", tensors_of(plan)
    name = f"window{WINDOW}.layers.1.text_key.step"
    write(path, values_of(plan), {**tensors, name: -tensors[name]})
    with pytest.raises(ValueError, match=f"window {WINDOW} layer 1 text_key step is"):
        Plan.load(path)
    tensors.pop(name)
    write(path, values_of(plan), tensors)
    with pytest.raises(ValueError, match=r"not laid out as plan format 7 says: KeyError\('layers.1.text_key.step'\)"):
        Plan.load(path)


def test_plans_that_do_not_belong_together_are_refused(plan):
    part = plan.windows[WINDOW]
    nested = {
        r"layers is \[2\], must be layers of no other window": replace(plan, window=WINDOW, windows={}),
        r"windows is \[9\], must be empty": replace(part, windows={9: replace(plan, window=9, windows={})}),
        "is 'dict', must be a Plan": {},
    }
    for message, wrong in nested.items():
        with pytest.raises(ValueError, match=f"plan: window {WINDOW} .*{message}|plan: window {WINDOW} {message}"):
            check_plan(replace(plan, windows={WINDOW: wrong}), "plan")
    with pytest.raises(ValueError, match=r"plan: window 30 window is 20, must be 30"):
        check_plan(replace(plan, windows={30: part}), "plan")


def test_a_plan_for_other_windows_is_refused(plan):
    other = windowed("one full", sliding_window=33)
    with pytest.raises(ValueError, match=r"plan: made for a window of 20 in layer 0; the model's is 33"):
        apack_compile.optimize(other, plan=plan)
    without = windowed("all sliding", sliding_window=None)
    sliding = apack_compile.optimize(windowed("all sliding"), preset="lossless", compile="none")
    with pytest.raises(ValueError, match=r"plan: made for a window of 20 in layer 0; the model's is without end"):
        apack_compile.optimize(without, plan=apack_compile.plan_for(sliding, TOKENS))
    ranking = apack_compile.optimize(without, preset="a-vl", compile="none")
    with pytest.raises(ValueError, match=r"plan: orders the tokens of layer 0 by importance, but .* a window of 20"):
        apack_compile.optimize(windowed("all sliding"), plan=apack_compile.plan_for(ranking, TOKENS))
    assert "generate" not in vars(other)


@torch.no_grad()
def test_static_buffers_of_layers_without_a_window_take_their_part_of_the_plan(plan, tmp_path):
    plan.save(tmp_path / "plan")
    model, log = windowed("one full"), apack_compile.GraphLog()
    options = {"own_cache": True, "inner": "eager", "log": log, "plan": str(tmp_path / "plan")}
    step = torch.compile(model.forward, backend="attentionpack", options=options)
    ours, theirs = (StaticCache(config=model.config, max_cache_len=128) for _ in range(2))
    tokens = torch.randint(2, 64, (1, 81), generator=torch.Generator().manual_seed(2))
    for cache in (ours, theirs):
        model(tokens[:, :80], past_key_values=cache)
    out, expected = (
        run(tokens[:, 80:], past_key_values=cache).logits for run, cache in ((step, ours), (model, theirs))
    )
    assert 1e-6 < float((out - expected).norm() / expected.norm()) < 0.3
    assert not ours.layers[2].keys.any() and ours.layers[0].keys.any(), (
        "the last layer's buffers are packed, others not"
    )


def test_an_exported_program_takes_the_plans_of_all_windows(tmp_path):
    model = windowed("one full")
    cache_config = {"batch_size": 1, "max_cache_len": 128}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache_config)
    apack_compile.optimize(model, AttentionPackConfig(ratio=2, coarse=(), compile="none", min_tokens=0))
    plan = apack_compile.plan_for(apack_compile.calibrate(model, prompt(1, vision=0)), 128)
    apack_compile.restore(model)
    count = torch.export.Dim("tokens", max=127)
    ids = torch.randint(2, 64, (1, 81), generator=torch.Generator().manual_seed(2))
    program = TorchExportableModuleForDecoderOnlyLM(model).export(
        input_ids=ids[:, :5],
        cache_position=torch.arange(5),
        dynamic_shapes={"input_ids": {1: count}, "cache_position": {0: count}},
    )
    packed = apack_compile.optimize(program, plan=plan, strict=True)
    assert len(apack_compile.report(packed).packed) == 3
    logits = []
    for module in (packed.module(), program.module()):
        module(input_ids=ids[:, :80], cache_position=torch.arange(80))
        logits.append(module(input_ids=ids[:, 80:], cache_position=torch.tensor([80])))
    assert 1e-6 < float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.3
