"""torch.autocast around what users call: states come in other dtypes, and what packs them must not be cast."""

import pytest
import torch
from llava_and_draft import greedy, llava, picture
from transformers import GPT2Config, GPT2LMHeadModel

import apack_compile

SETTINGS = [{"preset": "lossless"}, {"ratio": 4}, {"preset": "a-vl"}, {"preset": "attentionpack"}]
HALF = torch.autocast("cpu", dtype=torch.bfloat16)
OFF = torch.autocast("cpu", enabled=False)


def in_dtype(inputs, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def optimized(model, compile, around, **setting):
    apack_compile.optimize(model, compile=compile, **setting, min_tokens=0)
    if "ratio" in setting:
        with around:
            apack_compile.calibrate(model, in_dtype(picture([200, 100, 150], seed=5), model.dtype))
    return model


@pytest.mark.parametrize("compile", ("none", "eager"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_generate_packs_inside_of_autocast(setting, dtype, compile):
    model, inputs = llava().to(dtype), in_dtype(picture([60, 20], [9, 70]), dtype)
    with HALF:
        dense = greedy(model, inputs, 12)
    optimized(model, compile, OFF, **setting)
    cache = apack_compile.new_cache(model)
    with HALF:
        packed = greedy(model, inputs, 12, past_key_values=cache)
    report = apack_compile.report(model)
    assert packed.shape == dense.shape and report.bytes["tokens"] == 2 * (dense.shape[1] - 1)
    assert bool(report.graphs) == (compile != "none") and not any("eager" in note for note in report.notes)
    assert {layer.dtype for layer in cache.packed_layers} == {dtype}
    if "lossless" in setting.values():
        assert torch.equal(packed, dense)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_calibration_and_a_first_request_inside_of_autocast(setting):
    inputs = picture([60, 20])
    model = optimized(llava(), "none", HALF, **setting)
    with HALF:
        greedy(model, inputs, 4)
    greedy(model, inputs, 4)
    if "ratio" not in setting:
        return
    basis = apack_compile.plan_for(model, 80).bases[0][0].decoder[0].float()
    eye = torch.eye(basis.shape[1]).expand(len(basis), -1, -1)
    torch.testing.assert_close(basis @ basis.mT, eye, atol=2e-3, rtol=0)
    first = apack_compile.optimize(llava(), compile="none", **setting, min_tokens=0)
    with HALF:
        greedy(first, picture([200, 100, 150]), 4)
    assert apack_compile.report(first).bytes["tokens"] > 450


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("first", (HALF, OFF), ids=("inside-first", "outside-first"))
def test_a_cache_goes_on_where_autocast_begins_or_ends(setting, first):
    """Keys of GPT-2 get no rotation in float32: inside of autocast they are as narrow as its values."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=3, n_positions=900)).eval()
    apack_compile.optimize(model, compile="none", **setting, min_tokens=0)
    ids = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(1))
    if "ratio" in setting:
        apack_compile.calibrate(model, {"input_ids": torch.randint(3, 90, (1, 600))})
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        for around, part in (
            (first, ids[:, :200]),
            (OFF, ids[:, 200:280]),
            (HALF, ids[:, 280:299]),
            (OFF, ids[:, 299:]),
        ):
            with around:
                logits = model(input_ids=part, past_key_values=cache).logits
        dense = model(input_ids=ids).logits
    assert {layer.dtype for layer in cache.packed_layers} == {torch.float32} and int(cache.get_seq_length()) == 300
    if setting != {"preset": "a-vl"}:
        assert (logits[:, -1] - dense[:, -1]).abs().max() < 0.1 * dense[:, -1].abs().max()


def test_states_are_packed_as_outside_of_autocast():
    def filled(around):
        model = optimized(llava(), "none", OFF, ratio=4)
        cache = apack_compile.new_cache(model)
        generator = torch.Generator().manual_seed(0)
        with around:
            for tokens in (90, 3, 40, 1):
                states = [torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(2)]
                out = [cache.update(*states, layer) for layer in range(3)]
            key, value = out[0]
            query = torch.randn(2, 6, 1, 8, generator=generator)
            layer = cache.packed_layers[0]
            attended = torch.ops.apack.attend.default(
                query,
                *(x[:, :, -1:].contiguous() for x in (key, value)),
                None,
                *layer.state().flatten(),
                0.3,
            )
        return [*layer.dense_tensors(), *layer.packed_tensors(), key, value, attended]

    for inside, outside in zip(filled(HALF), filled(OFF), strict=True):
        assert inside.dtype == outside.dtype and torch.equal(inside, outside)
