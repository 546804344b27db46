"""Statistics from calibration inputs, and which tokens they come from."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from apack_compile.calibration.collect import Observations, collect
from apack_compile.calibration.streams import PRIOR_TOKENS, RunningMoments, fitted
from apack_compile.models.modality import padding_of, placeholder_ids, vision_of
from apack_compile.plan.basis import moments
from apack_compile.plan.budget import budget_plan
from apack_compile.plan.plan import FIRST_TOKENS

IMAGE = 9


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.image_token_id = IMAGE
    return LlamaForCausalLM(config).eval()


def prompt(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 32, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 2), st.floats(-100, 100))
def test_running_moments_equal_the_moments_of_all_tokens_at_once(lengths, groups, shift):
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(groups, sum(lengths), 7, generator=generator) + shift
    running = RunningMoments()
    for part in x.split(lengths, dim=1):
        running.add(part)
    found, expected = running.finish(), moments(x[None].double())
    torch.testing.assert_close(found.count.double(), expected.count)
    torch.testing.assert_close(found.mean.double(), expected.mean, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.covariance.double(), expected.covariance, atol=2e-4, rtol=1e-4)


def test_moments_drawn_towards_others_are_those_of_as_many_more_tokens_around_their_own_mean():
    generator = torch.Generator().manual_seed(3)
    own, others = (torch.randn(2, count, 7, generator=generator).double() + count for count in (9, 40))
    few, many = RunningMoments(), RunningMoments()
    few.add(own)
    many.add(others)
    few.draw_towards(many, 40)
    moved = others - others.mean(1, keepdim=True) + own.mean(1, keepdim=True)
    found, expected = few.finish(), moments(torch.cat([own, moved], 1)[None])
    torch.testing.assert_close(found.mean.double(), expected.mean, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.covariance.double(), expected.covariance, atol=2e-4, rtol=1e-4)
    assert few.sample.tokens.shape[1] == 9 + 40


def test_less_variance_is_spread_over_directions_that_no_picture_showed_than_over_those_that_no_text_did():
    x = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(5))
    running = {(0, name, 0): RunningMoments() for name in ("text", "vision")}
    for part in running.values():
        part.add(x)
    average = running[0, "text", 0].finish().covariance[0, 0].diagonal().mean()
    for (_, name, _), (spectrum, _) in fitted(running).items():
        share = 9 / (9 + {"text": 20, "vision": 1_000}[name] * 4)
        torch.testing.assert_close(spectrum.deviation[0, 0, -1].square(), share * average, rtol=1e-3, atol=0)


def test_padding_and_first_tokens_never_enter_the_statistics(model):
    ids = prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    statistics = collect(Observations(model, [0, 1], {"input_ids": ids, "attention_mask": mask}))[0]
    other = ids.clone()
    other[1, :11] = 3
    again = collect(Observations(model, [0, 1], {"input_ids": other, "attention_mask": mask}))[0]
    for layer in range(2):
        key, value = statistics[layer]["text"]
        assert key.spectrum.mean.shape == (1, 1, 12)
        torch.testing.assert_close(key.weights, again[layer]["text"][0].weights)
        torch.testing.assert_close(value.spectrum.mean, again[layer]["text"][1].spectrum.mean)
    with torch.no_grad():
        cache = model(input_ids=ids[:1], use_cache=True).past_key_values
    alone = collect(Observations(model, [1], {"input_ids": ids[:1]}))[0]
    expected = cache.layers[1].values[0, :, FIRST_TOKENS:].transpose(0, 1).flatten(1).mean(0)
    torch.testing.assert_close(alone[1]["text"][1].spectrum.mean[0, 0], expected)


def test_vision_and_text_have_statistics_of_their_own(model):
    ids = prompt(1, 40)
    ids[0, 8:25] = IMAGE
    statistics = collect(Observations(model, [0], [{"input_ids": ids}, {"input_ids": prompt(1, 20, seed=1)}]))[0]
    assert set(statistics[0]) == {"vision", "text"}
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    expected = cache.layers[0].values[0, :, 8:25].transpose(0, 1).flatten(1).mean(0)
    torch.testing.assert_close(statistics[0]["vision"][1].spectrum.mean[0, 0], expected, atol=1e-5, rtol=1e-4)
    assert "vision" not in collect(Observations(model, [0], {"input_ids": prompt(1, 20)}))[0][0]


def test_little_text_gets_a_part_of_the_pictures_variance(model):
    ids = prompt(1, 40)
    ids[0, 8:25] = IMAGE
    statistics = collect(Observations(model, [0], {"input_ids": ids}))[0]
    with torch.no_grad():
        states = model(input_ids=ids, use_cache=True).past_key_values.layers[0].values[0].transpose(0, 1).flatten(1)
    vision, text = states[8:25], torch.cat([states[FIRST_TOKENS:8], states[25:]])
    variance = {name: float(x.var(0, correction=0).sum()) for name, x in {"vision": vision, "text": text}.items()}
    expected = {
        "vision": variance["vision"],
        "text": (len(text) * variance["text"] + PRIOR_TOKENS * variance["vision"]) / (len(text) + PRIOR_TOKENS),
    }
    found = {name: float(both[1].spectrum.deviation.square().sum()) for name, both in statistics[0].items()}
    assert found == pytest.approx(expected, rel=1e-4)


def test_statistics_of_a_model_make_a_plan(model):
    statistics = collect(Observations(model, [0, 1], {"input_ids": prompt(2, 60)}), groups=2)[0]
    plan = budget_plan(statistics, 3.0, 2000, 0.0)
    assert plan.groups == 2 and set(plan.layers) == {0, 1}
    assert all((s.weights >= 0).all() and torch.isfinite(s.weights).all() for s in statistics[0]["text"])


@pytest.mark.parametrize("tokens", (1, FIRST_TOKENS))
def test_inputs_without_a_usable_token_are_refused(model, tokens):
    with pytest.raises(ValueError, match="no usable token"):
        collect(Observations(model, [0, 1], {"input_ids": prompt(2, tokens)}))
    mask = torch.zeros(1, 20, dtype=torch.long)
    mask[0, 16:] = 1
    with pytest.raises(ValueError, match="no usable token"):
        collect(Observations(model, [0, 1], {"input_ids": prompt(1, 20), "attention_mask": mask}))


def test_vision_tokens_are_the_placeholders_of_the_config():
    config = SimpleNamespace(image_token_id=9, video_token_index=7, audio_token_id=None)
    assert placeholder_ids(config) == [7, 9]
    assert vision_of(config, {"input_ids": torch.tensor([[1, 9, 7, 8]])}).tolist() == [[False, True, True, False]]
    assert vision_of(config, {"inputs_embeds": torch.zeros(1, 4, 2)}) is None
    assert vision_of(SimpleNamespace(), {"input_ids": torch.tensor([[1]])}) is None


def test_padding_is_what_the_mask_hides():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    hidden = [[True, True, False, False], [False] * 4]
    assert padding_of({"attention_mask": mask}, 4).tolist() == hidden
    causal = mask[:, None, None].bool() & torch.ones(4, 4).tril().bool()
    assert padding_of({"attention_mask": causal}, 4).tolist() == hidden
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert padding_of({"attention_mask": {"full_attention": added}}, 4).tolist() == hidden
    assert padding_of({"attention_mask": None}, 4) is None
    assert padding_of({}, 4) is None


def test_a_mask_of_a_window_does_not_hide_what_only_the_last_rows_do_not_see():
    real = torch.tensor([[False] * 2 + [True] * 6, [True] * 8])
    row, column = torch.arange(8)[:, None], torch.arange(8)
    window = ((column <= row) & (column > row - 3)) & real[:, None, None]
    assert torch.equal(padding_of({"attention_mask": window}, 8), ~real)
    assert torch.equal(padding_of({"attention_mask": {"sliding_attention": window}}, 8), ~real)
    later = window[:, :, 5:, 3:]
    assert not padding_of({"attention_mask": later}, 3, 5).any(), "columns of the window alone"
    assert padding_of({"attention_mask": later}, 4, 5) is None


def test_padding_of_a_later_chunk_is_found_in_a_mask_as_long_as_the_cache():
    mask = torch.zeros(1, 1, 2, 10, dtype=torch.bool)
    mask[..., 1:6] = True
    assert padding_of({"attention_mask": mask}, 2, 4).tolist() == [[False, False]]
    assert padding_of({"attention_mask": torch.ones(1, 6)}, 2, 4).tolist() == [[False, False]]
