"""What users do with a model after it was optimized: moves, copies, new weights, other modes of autograd."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
from llava_and_draft import calibrated, greedy, llava, picture
from vlms import build

import apack_compile

LOSSLESS, LOSSY, TIERS = {"preset": "lossless"}, {"ratio": 4}, {"preset": "a-vl"}


def halved(inputs):
    return {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("setting", [LOSSLESS, LOSSY, TIERS], ids=str)
def test_a_model_moved_to_another_dtype_goes_on(setting):
    model, inputs = calibrated(llava(), **setting), picture([60, 20])
    before = apack_compile.plan_for(model, 80) if "ratio" in setting else None
    greedy(model, inputs, 3)
    dense = greedy(apack_compile.restore(copy.deepcopy(model)).to(torch.bfloat16), halved(inputs))
    model.to(torch.bfloat16)
    packed = greedy(model, halved(inputs))
    if setting is LOSSLESS:
        assert torch.equal(packed, dense)
    assert packed.shape == dense.shape
    if before is not None:
        after = apack_compile.plan_for(model, 80)
        assert (before.signature[-1], after.signature[-1]) == ("torch.float32", "torch.bfloat16")
        assert after.layers == before.layers


def test_a_cache_from_before_a_move_is_refused():
    model, inputs = calibrated(llava(), **LOSSLESS), picture()
    cache = apack_compile.new_cache(model)
    greedy(model, inputs, 3, past_key_values=cache)
    model.half()
    with pytest.raises(
        ValueError, match=r"cache: one for .* torch\.float32 was passed to a model with .* torch\.float16"
    ):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_a_plan_of_another_dtype_is_refused():
    model = calibrated(llava(), **LOSSY)
    apack_compile.optimize(model, plan=apack_compile.plan_for(model, 80), compile="none")
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"plan: made for .* torch\.float32; the model now has .* torch\.bfloat16"):
        greedy(model, halved(picture()))
    greedy(model.float(), picture())


def test_a_model_without_weights_is_refused():
    model = calibrated(llava(), **LOSSLESS).to("meta")
    with pytest.raises(ValueError, match="weights are on the meta device now; load them"):
        greedy(model, picture())


def test_bases_follow_the_model_to_its_device(monkeypatch):
    model = calibrated(llava(), **LOSSY)
    assert apack_compile.plan_for(model, 80).bases[0][0].decoder.device.type == "cpu"
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    assert apack_compile.plan_for(model, 80).bases[0][0].decoder.device.type == "meta"


@pytest.mark.parametrize("compile", ["none", "eager"])
def test_a_copy_is_a_model_of_its_own(compile):
    model, inputs = calibrated(llava(), compile, **LOSSY), picture([60, 20])
    tokens = greedy(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(greedy(twin, inputs), tokens)
    assert len(apack_compile.report(twin).graphs) == len(apack_compile.report(model).graphs) == (compile == "eager")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(greedy(model, inputs), tokens)
    assert not torch.equal(greedy(twin, inputs), tokens)
    apack_compile.restore(twin)
    assert not twin._forward_pre_hooks and not twin._load_state_dict_post_hooks and model._forward_pre_hooks
    assert torch.equal(greedy(model, inputs), tokens)


def test_pickling_says_what_to_do_instead():
    model = llava()
    torch.save(model, io.BytesIO())
    calibrated(model, "eager", **LOSSLESS)
    with pytest.raises(pickle.PicklingError, match=r"cannot be pickled: call apack_compile\.restore\(model\) first"):
        torch.save(model, io.BytesIO())
    torch.save(apack_compile.restore(model), io.BytesIO())


def test_pickling_says_so_of_a_model_that_ran_too():
    model = calibrated(llava(), **LOSSY)
    # hooks of transformers' own, which cannot be pickled either
    model(**picture(), output_hidden_states=True)
    with pytest.raises(pickle.PicklingError, match="an optimized model cannot be pickled"):
        pickle.dumps(model)


def test_a_saved_model_is_the_one_from_before(tmp_path):
    model, inputs = llava(), picture()
    names, dense = set(model.state_dict()), greedy(model, inputs)
    calibrated(model, **LOSSY)
    greedy(model, inputs, 3)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    again.generation_config.eos_token_id = None
    assert torch.equal(greedy(again, inputs), dense)


def test_new_weights_are_noted_until_they_are_calibrated():
    model, inputs = calibrated(llava(), **LOSSY), picture()
    note = "load_state_dict after the bases were calibrated: they fit the weights before it; call calibrate again"
    assert note not in apack_compile.report(model).notes
    model.load_state_dict(build("llava")[0].state_dict())
    greedy(model, inputs, 3)
    assert note in apack_compile.report(model).notes
    apack_compile.calibrate(model, picture([90, 90]))
    assert note not in apack_compile.report(model).notes


def test_new_weights_concern_no_preset():
    model = calibrated(llava(), **LOSSLESS)
    model.load_state_dict(model.state_dict())
    assert not apack_compile.report(model).notes


def test_training_mode_changes_nothing():
    model, inputs = calibrated(llava(), **LOSSLESS), picture()
    tokens = greedy(model, inputs)
    assert torch.equal(greedy(model.train(), inputs), tokens) and model.training


@pytest.mark.parametrize(
    ("setting", "compile"), [(LOSSLESS, "none"), (LOSSY, "none"), (TIERS, "none"), (TIERS, "eager")], ids=str
)
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(setting, compile):
    model, inputs = calibrated(llava(), **setting), picture([60, 20])
    apack_compile.optimize(model, compile=compile, **setting, min_tokens=0)
    caches = [apack_compile.new_cache(model) for _ in range(2)]
    first = greedy(model, inputs, 10, past_key_values=caches[0])
    with torch.inference_mode():
        assert torch.equal(greedy(model, picture([60, 20]), 10, past_key_values=caches[1]), first)
    more = torch.cat([first, torch.full((1, 5), 7)], 1)
    later = [
        greedy(model, {"input_ids": more, "attention_mask": torch.ones_like(more)}, 30, past_key_values=cache)
        for cache in caches
    ]
    assert torch.equal(*later)
    with torch.inference_mode():
        caches[0].batch_repeat_interleave(2)
    caches[0].reorder_cache(torch.tensor([1, 0]))


def test_a_first_request_in_inference_mode_calibrates():
    model, inputs = apack_compile.optimize(llava(), ratio=4, compile="none", min_tokens=0), picture([60, 40])
    with torch.inference_mode():
        greedy(model, picture([60, 40]), 3)
    bases = apack_compile.plan_for(model, 80).bases[0]
    assert not any(tensor.is_inference() for basis in bases for tensor in basis)
    loss = model(**inputs, past_key_values=apack_compile.new_cache(model)).logits.sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    ("setting", "backend"), [(LOSSLESS, "eager"), (TIERS, "attentionpack"), (TIERS, "eager")], ids=str
)
def test_a_forward_that_the_user_compiled_gives_the_same_tokens_or_a_note(setting, backend):
    model, inputs = calibrated(llava(), **setting), picture([60, 20])
    tokens = greedy(model, inputs, 6)
    options = {"inner": "eager"} if backend == "attentionpack" else None
    model.forward = torch.compile(model.forward, backend=backend, options=options)
    again = greedy(model, inputs, 6)
    noted = any("a forward compiled by hand" in note for note in apack_compile.report(model).notes)
    assert noted == (setting is TIERS)
    assert torch.equal(again, tokens) or (noted and backend == "eager")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["function", "bound to the model", "around the one that is there", "partial"])
def test_a_function_that_prepares_inputs_is_the_users_during_and_after_optimize(how, when):
    model, inputs, calls = llava(), picture([60, 20]), []
    dense = greedy(model, inputs, 4)
    if when == "after":
        apack_compile.optimize(model, preset="lossless", compile="none")
    there = model.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        calls.append(args)
        return type(model).prepare_inputs_for_generation(model, *args, **kwargs)

    @functools.wraps(there)
    def around(self, *args, **kwargs):
        calls.append(args)
        return there(*args, **kwargs)

    users = {
        "function": prepare,
        "bound to the model": types.MethodType(lambda self, *args, **kwargs: prepare(*args, **kwargs), model),
        "around the one that is there": types.MethodType(around, model),
        "partial": functools.partial(prepare),
    }[how]
    model.prepare_inputs_for_generation = users
    for compile in ("none", "eager"):
        apack_compile.optimize(model, preset="lossless", compile=compile)
        calls.clear()
        assert torch.equal(greedy(model, inputs, 4), dense) and calls
        assert vars(model)["prepare_inputs_for_generation"] is users
        notes = apack_compile.report(model).notes
        assert any("prepare_inputs_for_generation was replaced" in note for note in notes)
    assert vars(apack_compile.restore(model))["prepare_inputs_for_generation"] is users
    assert torch.equal(greedy(model, inputs, 4), dense)
    del model.prepare_inputs_for_generation
    apack_compile.optimize(model, preset="lossless", compile="eager")
    assert torch.equal(greedy(model, inputs, 4), dense) and apack_compile.report(model).graphs


def test_a_users_generate_comes_back_and_the_report_says_that_it_is_not_called():
    model, inputs, calls = llava(), picture([60, 20]), []
    dense = greedy(model, inputs, 4)

    def around(function):
        def users(*args, **kwargs):
            calls.append(kwargs)
            return function(*args, **kwargs)

        return users

    note = "optimize replaced a generate that a user had put on this model"
    model.generate = before = around(model.generate)
    apack_compile.optimize(model, preset="lossless", compile="none")
    assert torch.equal(greedy(model, inputs, 4), dense) and not calls
    assert any(found.startswith(note) for found in apack_compile.report(model).notes)
    assert vars(apack_compile.restore(model))["generate"] is before
    del model.generate
    apack_compile.optimize(model, preset="lossless", compile="none")
    model.generate = after = around(model.generate)
    assert torch.equal(greedy(model, inputs, 4), dense) and calls
    held = apack_compile.report(model)
    assert held.bytes["tokens"] and not any(found.startswith(note) for found in held.notes)
    # it calls what optimize had put there
    assert vars(apack_compile.restore(model))["generate"] is after
    assert torch.equal(greedy(model, inputs, 4), dense)


def test_a_plan_is_not_noted_for_weights_loaded_before_it():
    model = calibrated(llava(), ratio=4)
    plan = apack_compile.plan_for(model, 300)
    model.load_state_dict(model.state_dict())
    report = apack_compile.report(apack_compile.optimize(model, plan=plan, compile="none"))
    assert not [note for note in report.notes if "load_state_dict" in note]
