"""A packed cache is found by either of its names and by position, whichever a model's forward takes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from vlms import PAD, TEXT

import apack_compile
from apack_compile.errors import StrictError
from apack_compile.generate.session import session_of
from apack_compile.models.cache_argument import NAMES, OWN_NAME, cache_name, cache_of, named_arguments, with_cache

PROMPT = 47


class OlderLlama(LlamaForCausalLM):
    """As models are written for transformers before 5.24."""

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, **kwargs):
        rest = {name: x for name, x in kwargs.items() if name not in NAMES}
        return super().forward(input_ids, attention_mask, **{OWN_NAME: past_key_values}, **rest)


class NewerLlama(LlamaForCausalLM):
    """As models are written for transformers 5.24."""

    def forward(self, input_ids=None, cache=None, attention_mask=None, **kwargs):
        rest = {name: x for name, x in kwargs.items() if name not in NAMES}
        return super().forward(input_ids, attention_mask, **{OWN_NAME: cache}, **rest)


class WrappedLlama(LlamaForCausalLM):
    """Hands all its arguments on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class ForgetfulLlama(LlamaForCausalLM):
    """Takes a cache and does not use it."""

    def forward(self, input_ids, past_key_values=None, cache=None, **kwargs):
        return super().forward(input_ids, use_cache=False)


KINDS = (LlamaForCausalLM, OlderLlama, NewerLlama, WrappedLlama)


def llama(kind: type = LlamaForCausalLM, seed: int = 0, **settings: object) -> LlamaForCausalLM:
    """A small model."""
    torch.manual_seed(seed)
    return kind(LlamaConfig(**TEXT | settings)).eval()


def prompt(rows: int = 2) -> dict[str, torch.Tensor]:
    """A batch whose last row is padded on the left."""
    ids = torch.randint(5, 90, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[-1, :6], mask[-1, :6] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def passed(model: nn.Module, way: str, inputs: dict[str, torch.Tensor], cache: object) -> tuple[tuple, dict]:
    """The arguments of a call that passes the cache in one of the ways."""
    if way != "position":
        return (), {**inputs, way: cache}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if isinstance(model, (OlderLlama, NewerLlama)):
        return (ids, cache, mask), {}
    return (ids, mask, None, cache), {}


@pytest.mark.parametrize("way", [*NAMES, "position"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_packed_cache_is_announced_filled_and_read(kind, way):
    model = apack_compile.optimize(llama(kind), preset="lossless", compile="none")
    inputs, cache = prompt(), apack_compile.new_cache(model)
    expected = llama()(**inputs, use_cache=True).logits
    args, kwargs = passed(model, way, inputs, cache)
    logits = model(*args, **kwargs).logits
    torch.testing.assert_close(logits[inputs["attention_mask"] > 0], expected[inputs["attention_mask"] > 0])
    assert int(cache.get_seq_length()) == PROMPT
    # padding is announced, so it has no slot
    assert sorted(cache.index.positions[0][1].tolist())[0] == 6


@pytest.mark.parametrize("way", [*NAMES, "position"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_another_model_is_refused(kind, way):
    other = apack_compile.optimize(llama(num_key_value_heads=3), preset="lossless", compile="none")
    model = apack_compile.optimize(llama(kind), preset="lossless", compile="none")
    cache = apack_compile.new_cache(other)
    args, kwargs = passed(model, way, prompt(), cache)
    with pytest.raises(ValueError, match="cache: one for 3 layers, 3 KV heads x 8"):
        model(*args, **kwargs)
    assert not cache.is_filled


@pytest.mark.parametrize("way", [*NAMES, "position"])
@torch.no_grad()
def test_the_first_prompt_is_calibrated_on_beside_the_callers_cache(way):
    model = apack_compile.optimize(llama(), ratio=3, compile="none", min_tokens=0)
    cache = apack_compile.new_cache(model)
    args, kwargs = passed(model, way, prompt(), cache)
    model(*args, **kwargs)
    assert cache.is_filled and int(cache.get_seq_length()) == PROMPT
    assert session_of(model).calibration.inputs == "the first request"


@torch.no_grad()
def test_a_cache_has_the_calibration_that_came_after_it():
    model = apack_compile.optimize(llama(), ratio=3, compile="none", min_tokens=0)
    cache = apack_compile.new_cache(model)
    apack_compile.calibrate(model, prompt())
    model(**prompt(), past_key_values=cache)
    assert cache.index.plan.provenance.calibrated_on == "calibrate"


@pytest.mark.parametrize("way", [None, *NAMES])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_packs_for_every_forward(kind, way):
    expected = llama().generate(**prompt(), max_new_tokens=9, do_sample=False)
    model = apack_compile.optimize(llama(kind), preset="lossless", compile="none")
    cache = {} if way is None else {way: apack_compile.new_cache(model)}
    found = model.generate(**prompt(), **cache, max_new_tokens=9, do_sample=False)
    assert torch.equal(found, expected)
    assert all(int(one.get_seq_length()) == PROMPT + 8 for one in cache.values())


def test_a_forward_that_does_not_use_its_cache_is_dense_and_noted_or_raises():
    text = "ForgetfulLlama.forward stored nothing in the packed cache that it was given"
    model = llama(ForgetfulLlama)
    dense = model.generate(**prompt(), max_new_tokens=3, do_sample=False)
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(model)
    model(prompt()["input_ids"], past_key_values=cache)
    assert cache.notes == [text]
    assert torch.equal(model.generate(**prompt(), max_new_tokens=3, do_sample=False), dense)
    report = apack_compile.report(model)
    assert report.bytes is None and f"the last generate used no packed cache: {text}" in report.notes
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    for call in (
        lambda: model(**prompt(), past_key_values=apack_compile.new_cache(model)),
        lambda: model.generate(**prompt()),
    ):
        with pytest.raises(StrictError, match=text):
            call()


def test_the_error_of_a_forward_is_the_one_that_is_raised():
    model = apack_compile.optimize(llama(OlderLlama), preset="lossless", compile="none")
    with pytest.raises(IndexError, match="out of range"):
        model(torch.full((1, PROMPT), 999), past_key_values=apack_compile.new_cache(model))


def test_the_name_is_that_of_the_forward():
    names = {kind.__name__: cache_name(llama(kind)) for kind in KINDS}
    assert names == {
        "LlamaForCausalLM": OWN_NAME,
        "OlderLlama": "past_key_values",
        "NewerLlama": "cache",
        "WrappedLlama": OWN_NAME,
    }
    assert cache_name(nn.Linear(2, 2)) == OWN_NAME


def test_arguments_get_the_names_of_the_forward_that_takes_them():
    ids, mask = torch.ones(1, 3), torch.ones(1, 3)
    for kind in (LlamaForCausalLM, WrappedLlama):
        named = named_arguments(llama(kind), (ids, mask), {"use_cache": True})
        assert list(named) == ["input_ids", "attention_mask", "use_cache"]
        assert named["input_ids"] is ids and named["attention_mask"] is mask
    assert list(named_arguments(llama(OlderLlama), (ids, None, mask), {})) == [
        "input_ids",
        "past_key_values",
        "attention_mask",
    ]


def test_a_cache_takes_the_place_of_any_other():
    model, other, cache = llama(OlderLlama), SimpleNamespace(), SimpleNamespace()
    inputs = with_cache(model, {"input_ids": 1, "cache": other}, cache)
    assert inputs == {"input_ids": 1, "past_key_values": cache}
    assert cache_of((), {"cache": None, "past_key_values": cache}) is cache
    assert cache_of((1, None), {"cache": None}) is None
