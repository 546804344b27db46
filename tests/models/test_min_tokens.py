"""From which length generate packs: below it, transformers' own cache serves the whole call, and the report says so."""

import pytest
import torch
from vlms import build, prompt

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.generate import session
from apack_compile.plan.time_model import default_min_tokens

NEW_TOKENS = 5


@pytest.fixture(scope="module")
def llava():
    model, placeholders = build("llava")
    return model, prompt("llava", [[30, 10], [12, 4]], placeholders)


def packs(model, inputs) -> bool:
    """Whether a generate call uses a packed cache."""
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return vars(model)["_apack_session"].last.unused is None


def test_prompt_and_new_tokens_of_a_row_decide(llava):
    model, inputs = llava
    rows, length = inputs["input_ids"].shape
    expected = length + NEW_TOKENS
    assert rows == 2
    dense = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=expected + 1)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False), dense)
    report = apack_compile.report(model)
    assert report.bytes is None
    assert report.notes == (
        f"the last generate used no packed cache: prompt of {length} and {NEW_TOKENS} new tokens; "
        f"packed from min_tokens={expected + 1} on",
    )
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=expected)
    assert packs(model, inputs)
    assert apack_compile.report(model).bytes is not None
    apack_compile.restore(model)


def test_a_cache_that_is_asked_for_packs_at_any_length(llava):
    model, inputs = llava
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=10_000)
    model(**inputs, past_key_values=(cache := apack_compile.new_cache(model)))
    assert cache.report()["ratio"] > 1
    second = apack_compile.new_cache(model)
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, past_key_values=second)
    assert second.is_filled
    apack_compile.restore(model)


@pytest.mark.parametrize(
    ("setting", "packed"),
    (
        (AttentionPackConfig(ratio=3, compile="none"), False),
        (AttentionPackConfig(ratio=3, compile="none", min_tokens=0), True),
        (AttentionPackConfig(preset="lossless", compile="none"), True),
        (AttentionPackConfig(preset="lossless", compile="none", min_tokens=10_000), False),
    ),
)
def test_only_a_ratio_has_the_default_of_the_device(llava, monkeypatch, setting, packed):
    monkeypatch.setattr(session, "default_min_tokens", {"cpu": 10_000}.__getitem__)
    model, inputs = llava
    apack_compile.optimize(model, setting)
    assert packs(model, inputs) == packed
    apack_compile.restore(model)


def test_a_plan_packs_every_prompt(llava, monkeypatch):
    model, inputs = llava
    apack_compile.optimize(model, ratio=3, compile="none")
    apack_compile.calibrate(model, inputs)
    plan = apack_compile.plan_for(model, 64)
    monkeypatch.setattr(session, "default_min_tokens", {"cpu": 10_000}.__getitem__)
    apack_compile.optimize(model, plan=plan, compile="none")
    assert packs(model, inputs)
    apack_compile.restore(model)


def test_defaults_are_powers_of_two_and_unknown_devices_pack_everything():
    for device in ("cpu", "cuda"):
        least = default_min_tokens(device)
        assert least > 0 and least & (least - 1) == 0
    assert default_min_tokens("mps") == 0
