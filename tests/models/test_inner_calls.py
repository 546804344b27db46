"""A cache passed by position, or to a model inside of the optimized one: as if it were passed to the model by name."""

import pytest
import torch
from preset_rows import TIERED_PRESETS
from vlms import IMAGE, build, prompt

import apack_compile
from apack_compile.errors import StrictError

NOTES = {
    "keyword": [],
    "position": ["the cache was passed by position: packed as when it is passed by name"],
    "inner": ["LlavaModel was called itself: packed as when LlavaForConditionalGeneration is called"],
}
WAYS = {
    "keyword": lambda m, x, c: m(**x, past_key_values=c),
    "position": lambda m, x, c: m(x["input_ids"], x["pixel_values"], x["attention_mask"], None, c),
    "inner": lambda m, x, c: m.model(**x, past_key_values=c),
}


def llava(**setting):
    model, placeholders = build("llava")
    rows = [[30, 50, 60, 70, 80, 90, 20], [10, 60, 70, 60, 80, 90, 30]]
    return apack_compile.optimize(model, compile="none", **setting, min_tokens=0), prompt("llava", rows, placeholders)


@pytest.mark.parametrize("setting", [{"ratio": 4}, *TIERED_PRESETS], ids=str)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_pictures_and_padding_are_known_however_the_cache_is_passed(way, setting):
    found = []
    for name in ("keyword", way):
        model, inputs = llava(strict=True, **setting)
        cache = apack_compile.new_cache(model)
        WAYS[name](model, inputs, cache)
        model(
            input_ids=torch.full((2, 1), 7),
            attention_mask=torch.ones(2, inputs["input_ids"].shape[1] + 1),
            past_key_values=cache,
        )
        assert cache.notes == NOTES[name] and not cache.unsettled()
        found.append(cache)
    for one, other in zip(*(cache.packed_layers for cache in found), strict=True):
        for mine, its in zip(
            (*one.packed_tensors(), *one.positions()), (*other.packed_tensors(), *other.positions()), strict=True
        ):
            assert torch.equal(mine, its)
    pictures = int((llava(**setting)[1]["input_ids"] == IMAGE).sum())
    assert pictures and int(found[0].batch_size) == 2


@torch.no_grad()
def test_embeddings_in_the_language_model_are_text_and_noted():
    model, inputs = llava(preset="a-vl")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    cache = apack_compile.new_cache(model)
    model.model.language_model(inputs_embeds=embeddings, past_key_values=cache)
    assert "inputs_embeds without input_ids: vision positions unknown, all tokens taken as text" in cache.notes
    assert not cache.unsettled()


@torch.no_grad()
def test_tokens_that_no_model_announced_are_noted_or_raise():
    for strict in (False, True):
        model, _ = llava(preset="lossless", strict=strict)
        cache, states = apack_compile.new_cache(model), torch.randn(1, 2, 30, 8)
        if strict:
            with pytest.raises(StrictError, match="30 tokens came without a forward pass of the optimized model"):
                cache.update(states, states, 0)
            continue
        for layer in range(3):
            cache.update(states, states, layer)
        assert [note.split(":")[0] for note in cache.notes] == [
            "30 tokens came without a forward pass of the optimized model"
        ]


def test_without_a_calibration_the_error_says_what_can_be_done():
    model, _ = llava(ratio=4)
    states = torch.randn(1, 2, 30, 8)
    with pytest.raises(RuntimeError, match=r"ratio=4: no calibrated statistics yet; call apack_compile\.calibrate"):
        apack_compile.new_cache(model).update(states, states, 0)
