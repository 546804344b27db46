"""A first request that nothing was calibrated for: read once, and packed with bases of its own keys and values."""

import gc
import weakref

import pytest
import torch
from tiny_llama import SHAPE, VOCABULARY
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from vlms import IMAGE, build

import apack_compile
from apack_compile.calibration.collect import usable_tokens
from apack_compile.calibration.find_rotation import PROBE_TOKENS
from apack_compile.generate.first_request import queries_of
from apack_compile.generate.session import session_of
from apack_compile.plan.source import GRADIENTS, NEWEST_ATTENTION

SIZES = SHAPE | {"num_hidden_layers": 2}


def optimized(kind: str = "llama", **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "cohere": (CohereConfig, CohereForCausalLM)}[kind]
    attention = settings.pop("attention", "sdpa")
    made = model._from_config(config(**SIZES), attn_implementation=attention).eval()
    return apack_compile.optimize(made, **{"ratio": 3, "compile": "none", "min_tokens": 0} | settings)


def prompt(tokens: int = 210, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def packed(cache) -> list[torch.Tensor]:
    """What a cache holds of tokens."""
    return [x for layer in cache.packed_layers for x in (*layer.packed_tensors(), *layer.dense_tensors())]


@pytest.mark.parametrize("kind", ("llama", "cohere"))
def test_the_prompt_is_read_once_and_kept_as_the_bases_that_it_gave_keep_it(kind):
    model, ids, seen = optimized(kind), prompt(rows=2), []
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    first, again = (apack_compile.new_cache(model, 8) for _ in range(2))
    with torch.no_grad():
        dense = model(ids, logits_to_keep=1).logits
        seen.clear()
        logits = model(ids, past_key_values=first, logits_to_keep=1).logits
        assert sorted(seen) == [PROBE_TOKENS, ids.shape[1]]
        model(ids, past_key_values=again)
    hook.remove()
    torch.testing.assert_close(logits, dense)
    assert first.is_filled and all(map(torch.equal, packed(first), packed(again)))
    report = apack_compile.report(model)
    assert (report.calibrated_on, report.weighed_by) == ("the first request", NEWEST_ATTENTION)
    assert f"bases calibrated on: the first request, weighed by {NEWEST_ATTENTION}" in str(report)


def test_padding_on_the_left_changes_no_basis():
    held = []
    for pad in (0, 23):
        model, ids = optimized(), torch.nn.functional.pad(prompt(), (pad, 0))
        cache, mask = apack_compile.new_cache(model, 8), (torch.arange(ids.shape[1]) >= pad).long()[None]
        places = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        held.append(session_of(model).calibration.statistics)
    for layer in range(2):
        for found, wanted in zip(held[1][layer]["text"], held[0][layer]["text"], strict=True):
            torch.testing.assert_close(found.spectrum.deviation, wanted.spectrum.deviation, atol=1e-4, rtol=1e-3)
            assert float(found.weights.sum()) == pytest.approx(float(wanted.weights.sum()), rel=0.2)


def test_components_that_the_newest_tokens_do_not_ask_for_weigh_less():
    """A query that is nearly 0 makes every key's errors harmless."""
    model = optimized()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight *= 1e-3
    with torch.no_grad():
        model(prompt(), past_key_values=apack_compile.new_cache(model, 8))
    statistics = session_of(model).calibration.statistics
    keys = [float(statistics[layer]["text"][0].weights.sum()) for layer in range(2)]
    assert keys[1] < 0.05 * keys[0]


def test_the_newest_text_plays_the_tokens_to_come_wherever_it_stands():
    config = build("llava")[0].config
    ids = torch.full((3, 48), 7)
    ids[0, 4:40] = ids[1, 20:] = ids[2, 30:] = IMAGE
    mask = torch.ones_like(ids)
    # four more are first tokens
    mask[1, :14] = 0
    usable = usable_tokens(config, {"input_ids": ids, "attention_mask": mask}, ids[:, None, :, None])
    expected = [[47, 46, 45, 44, 43, 42], [19, 18, -1, -1, -1, -1], [29, 28, 27, 26, 25, 24]]
    assert queries_of(usable).tolist() == expected
    ids = torch.full((1, 16), IMAGE)
    assert queries_of(usable_tokens(config, {"input_ids": ids}, ids[:, None, :, None])).tolist() == [[15, 14]]


@pytest.mark.parametrize("kind", (KeyboardInterrupt, RuntimeError))
def test_an_interrupt_leaves_neither_states_nor_a_calibration(kind):
    model, ids = optimized(), prompt()
    cache = apack_compile.new_cache(model, 8)

    def stop(module, args):
        raise kind

    hook = model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(kind), torch.no_grad():
        model(ids, past_key_values=cache)
    hook.remove()
    assert cache.held_back is None and not cache.is_filled and session_of(model).source.needs_calibration
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.is_filled and not session_of(model).source.needs_calibration


def test_an_interrupt_while_bases_are_fitted_leaves_neither():
    """The progress bar is where it comes: fitting has begun, for some layers it has ended."""
    model, ids = optimized(), prompt()
    cache, seen = apack_compile.new_cache(model, 8), []

    class Stops:
        def __init__(self, *args, **kwargs):
            seen.append(len(cache.held_back.states))

        def __enter__(self):
            return self

        def __exit__(self, *given):
            return None

        def update(self):
            seen.append(0)
            if len(seen) == 4:
                raise KeyboardInterrupt

    before = logging.set_tqdm_hook(lambda factory, args, kwargs: Stops())
    try:
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(ids, past_key_values=cache)
    finally:
        logging.set_tqdm_hook(before)
    assert seen == [2, 0, 0, 0]
    assert cache.held_back is None and not cache.is_told and session_of(model).source.needs_calibration
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.is_filled and cache.get_seq_length() == ids.shape[1]


def test_states_that_cannot_be_packed_are_refused_and_leave_nothing():
    model = optimized()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("nan")
    cache = apack_compile.new_cache(model, 8)
    with (
        pytest.raises(ValueError, match=r"layer 1: value states hold NaN or Inf; the cache was left as it was"),
        torch.no_grad(),
    ):
        model(prompt(), past_key_values=cache)
    assert not cache.is_filled and session_of(model).source.needs_calibration


def test_no_state_outlives_its_packing():
    model, ids, alive = optimized(), prompt(), []
    cache = apack_compile.new_cache(model, 8)
    hold = model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, args, output: alive.append(weakref.ref(output.untyped_storage()))
    )
    with torch.no_grad():
        model(ids, past_key_values=cache)
    hold.remove()
    gc.collect()
    assert cache.is_filled and cache.held_back is None and all(reference() is None for reference in alive)


def test_attention_that_is_not_seen_is_calibrated_on_with_gradients():
    model = optimized(attention="eager")
    with torch.no_grad():
        model(prompt(), past_key_values=apack_compile.new_cache(model, 8))
    report = apack_compile.report(model)
    assert (report.calibrated_on, report.weighed_by) == ("the first request", GRADIENTS)


def test_calibrate_takes_the_place_of_the_first_request_s_bases():
    model, ids = optimized(), prompt()
    model.generate(ids, max_new_tokens=3, do_sample=False)
    apack_compile.calibrate(model, {"input_ids": prompt(seed=2)})
    report = apack_compile.report(model)
    assert (report.calibrated_on, report.weighed_by) == ("calibrate", GRADIENTS)


@pytest.mark.parametrize("settings", ({}, {"num_beams": 2}), ids=str)
def test_generate_goes_on_after_it(settings):
    model, ids = optimized(ratio=2), prompt(tokens=150)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | settings
    first, again = model.generate(ids, **settings), model.generate(ids, **settings)
    assert first.shape == (1, 162) and torch.equal(first, again)
