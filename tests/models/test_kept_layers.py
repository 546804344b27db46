"""Layers that are not packed, and linear states beside packed ones: every way to generate, and everything that is done to a cache."""

import copy
from dataclasses import replace

import pytest
import torch
from matrix import building
from matrix.building import build, case_of, class_names
from matrix.prompts import pixels_for, prompt_for
from transformers.cache_utils import DynamicIndexedLayer

import apack_compile
from apack_compile.generate.reporting import ONE_BY_ONE

# Cross-attention; recurrent states; convolutions alone; linear states and packed keys in one layer.
MODELS = ("mllama", "qwen3_5", "lfm2_vl", "inkling_mm_model")
# And an indexer's keys beside packed ones.
ALL_MODELS = (*MODELS, "qwen4_exp")


@pytest.fixture(autouse=True)
def kinds_of_layers(monkeypatch):
    """Inkling and Qwen4 with layers of one kind alone, LFM2 with two."""
    case = case_of("inkling_mm_model")
    every = {**case.config, "text_config.layer_types": ["hybrid"] * 4}
    monkeypatch.setitem(building.CASES, "inkling_mm_model", replace(case, config=every))
    case = case_of("lfm2_vl")
    kinds = {**case.config, "text_config.layer_types": ["conv", "full_attention"] * 2}
    monkeypatch.setitem(building.CASES, "lfm2_vl", replace(case, config=kinds))
    case = case_of("qwen4_exp")
    indexed = {**case.config, "text_config.layer_types": ["indexed_attention"] * 2, "text_config.num_hidden_layers": 2}
    monkeypatch.setitem(building.CASES, "qwen4_exp", replace(case, config=indexed))


def small(model_type):
    if model_type not in class_names():
        pytest.skip(f"this transformers has no {model_type}")
    if model_type == "qwen4_exp" and not hasattr(DynamicIndexedLayer(), "indexer_position_ids"):
        pytest.skip("this transformers keeps positions where no change of the batch reaches them")
    return build(model_type)


def picture_and_text(model, model_type, tokens=40):
    case = case_of(model_type)
    return prompt_for(model, case.pixels or pixels_for(model), case.placeholders, tokens)


def generate(model, inputs, **more):
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **more})


WAYS = {
    "greedy": {},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 17},
    "lookup": {"prompt_lookup_num_tokens": 4},
}


def beside_size(report) -> list[str]:
    """Notes of a report but for the one of lossless caches in float32, which hold more than a dense one in 16 bits."""
    return [note for note in report.notes if not note.startswith("holds more than a 16-bit dense cache")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_way_to_generate_gives_the_tokens_of_a_dense_cache(model_type, way):
    model = small(model_type)
    inputs = picture_and_text(model, model_type)
    if way == "chunks":
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    try:
        expected = generate(model, inputs, **WAYS[way])
    except (ValueError, RuntimeError, IndexError) as error:
        pytest.skip(f"transformers' own cache fails as well: {error}")
    apack_compile.optimize(model, preset="lossless", compile="eager", strict=True)
    assert torch.equal(generate(model, inputs, **WAYS[way]), expected)
    report = apack_compile.report(model)
    assert not beside_size(report)
    if way not in ("beams", "lookup"):
        # a model of older transformers breaks its graph at each layer
        read = {line.status for line in report.layers if line.reason != ONE_BY_ONE}
        assert read <= {"rewritten", "dense", "no keys"} and report.graphs


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_an_indexer_s_keys_follow_every_way_to_generate(way):
    model = small("qwen4_exp")
    inputs = picture_and_text(model, "qwen4_exp")
    expected = generate(model, inputs, **WAYS[way])
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    assert torch.equal(generate(model, inputs, **WAYS[way]), expected)
    assert apack_compile.report(model).bytes["unpacked_bytes"] > 0


@pytest.mark.parametrize("model_type", MODELS)
def test_a_second_turn_and_a_copy_go_on_where_the_first_one_ended(model_type):
    model = small(model_type)
    inputs = picture_and_text(model, model_type)
    more = torch.randint(5, 380, (1, 50), generator=torch.Generator().manual_seed(9))

    def turns(settings):
        first = generate(model, inputs, return_dict_in_generate=True, **settings)
        again = {"input_ids": torch.cat([first.sequences, more], 1)}
        again["attention_mask"] = torch.ones_like(again["input_ids"])
        cache = first.past_key_values
        twin = copy.deepcopy(cache)
        return [generate(model, again, past_key_values=one) for one in (cache, twin)]

    expected = turns({})
    apack_compile.optimize(model, preset="lossless", compile="eager", strict=True)
    for found, wanted in zip(turns({}), expected, strict=True):
        assert torch.equal(found, wanted)
    assert not beside_size(apack_compile.report(model))


@pytest.mark.parametrize("model_type", ALL_MODELS)
def test_rows_can_be_repeated_chosen_and_put_in_another_order(model_type):
    model = small(model_type)
    inputs = picture_and_text(model, model_type)
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        one = copy.deepcopy(cache)
        token = torch.tensor([[7]])
        expected = model(input_ids=token, past_key_values=one).logits
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        found = model(input_ids=token.expand(2, 1), past_key_values=cache).logits
    torch.testing.assert_close(found, expected.expand(2, -1, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ALL_MODELS)
def test_a_cache_that_was_reset_takes_another_batch_size(model_type):
    model = small(model_type)
    inputs = picture_and_text(model, model_type)
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    text = {"input_ids": torch.randint(5, 380, (3, 20), generator=torch.Generator().manual_seed(2))}
    cache, fresh = apack_compile.new_cache(model), apack_compile.new_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="batch size is 3, but this cache holds 1; use a new cache"):
            model(**text, past_key_values=cache)
        cache.reset()
        expected = model(**text, past_key_values=fresh).logits
        assert torch.equal(model(**text, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("tokens", [10, 40])
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_hybrid_layers_with_a_window_are_packed_and_decode_eagerly(way, tokens, monkeypatch):
    case = case_of("inkling_mm_model")
    kinds = {**case.config, "text_config.layer_types": ["hybrid_sliding", "hybrid"] * 2}
    monkeypatch.setitem(building.CASES, "inkling_mm_model", replace(case, config=kinds))
    model = small("inkling_mm_model")
    assert model.config.text_config.sliding_window_size == 24
    inputs = picture_and_text(model, "inkling_mm_model", tokens)
    expected = generate(model, inputs, max_new_tokens=40, **WAYS[way])
    apack_compile.optimize(model, preset="lossless", compile="eager", strict=True)
    assert torch.equal(generate(model, inputs, max_new_tokens=40, **WAYS[way]), expected)
    report = apack_compile.report(model)
    assert {line.status for line in report.layers} == {"packed"} and not report.graphs
    assert [note for note in report.notes if note.startswith("hybrid_sliding: ") and note.endswith("runs eagerly")]


def test_bytes_of_linear_states_are_counted():
    for model_type in ("qwen3_5", "inkling_mm_model"):
        model = small(model_type)
        inputs = picture_and_text(model, model_type)
        apack_compile.optimize(model, preset="lossless", compile="none")
        cache = apack_compile.new_cache(model)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        before = cache.report()
        linear = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
        states = [s for layer in linear for each in (layer.conv_states, layer.recurrent_states) for s in each.values()]
        held = sum(state.numel() * state.element_size() for state in states if state is not None)
        for layer in linear:
            layer.conv_states, layer.recurrent_states = {}, {}
        assert held > 0 and before["sequence_bytes"] - cache.report()["sequence_bytes"] == held


def test_what_linear_states_cannot_forget_is_refused_before_anything_changes():
    model = small("qwen3_5")
    inputs = picture_and_text(model, "qwen3_5")
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        held = int(cache.get_seq_length())
        with pytest.raises(
            ValueError, match="cannot remove 2 tokens; the linear states of layers 0, 1, 2 cannot go back"
        ):
            cache.crop(-2)
        cache.crop(0)
        assert int(cache.get_seq_length()) == held
        bad = torch.full((1, 3, model.config.text_config.hidden_size), float("nan"))
        for message in ("NaN or Inf", "the last chunk did not end, and some layers keep what they took of it"):
            with pytest.raises(ValueError, match=message):
                model(inputs_embeds=bad, past_key_values=cache)
        cache.reset()
        assert model(**inputs, past_key_values=cache).logits.isfinite().all()


def test_an_indexer_s_keys_are_cropped_with_the_tokens():
    model = small("qwen4_exp")
    inputs = picture_and_text(model, "qwen4_exp")
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    cache, more = apack_compile.new_cache(model), torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        expected = model(input_ids=more, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=more + 5, past_key_values=cache)
        cache.crop(-3)
        torch.testing.assert_close(model(input_ids=more, past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)


def test_pictures_stay_when_text_is_cropped_and_a_chunk_that_fails_leaves_them():
    model = small("mllama")
    inputs = picture_and_text(model, "mllama")
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    cache = apack_compile.new_cache(model)
    more = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        expected = model(input_ids=more, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=more, past_key_values=cache)
        cache.crop(-3)
        with pytest.raises(ValueError, match="NaN or Inf"):
            model(inputs_embeds=torch.full((1, 3, 64), float("nan")), past_key_values=cache)
        torch.testing.assert_close(model(input_ids=more, past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ALL_MODELS)
def test_branches_of_a_prefix_have_what_is_not_packed_each(model_type):
    model = small(model_type)
    inputs = picture_and_text(model, model_type)
    asked = torch.randint(5, 380, (2, 6), generator=torch.Generator().manual_seed(9))
    dense = copy.deepcopy(model)
    apack_compile.optimize(model, preset="lossless", compile="eager", strict=True)
    prefix = apack_compile.read(model, **inputs)
    for _ in range(2):
        out = prefix.generate(asked, max_new_tokens=12, do_sample=False)
        for row, ids in zip(out, asked, strict=True):
            first = dense(**inputs, use_cache=True)
            cache = first.cache if hasattr(first, "cache") else first.past_key_values
            whole = torch.cat([inputs["input_ids"], ids[None]], 1)
            mask = torch.ones_like(whole)
            wanted = generate(dense, {"input_ids": whole, "attention_mask": mask}, past_key_values=cache)
            assert torch.equal(row, wanted[0])
    with pytest.raises(ValueError, match="hold what is not packed, which cannot be saved or moved"):
        prefix.save("never")
