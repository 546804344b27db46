"""The Fisher information of cached states predicts what disturbing them costs."""

from itertools import product

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from apack_compile.calibration.collect import Observations, collect
from apack_compile.calibration.sensitivity import (
    TOO_SHORT,
    Observation,
    draw_gradients,
    drawn_score,
    observe,
    pictures_beside,
    query_tokens,
    split,
)

TOKENS = 48


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    config.image_token_id = 9
    return LlamaForCausalLM(config).eval().double()


def prompt(rows: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(10, 32, (rows, tokens), generator=torch.Generator().manual_seed(1))


def gradients_of(seen: Observation) -> list[tuple[int, int, torch.Tensor]]:
    """Layer, stream and gradient of every draw."""
    found: list[tuple[int, int, torch.Tensor]] = []
    draw_gradients(seen, lambda layer, stream, gradient: found.append((layer, stream, gradient.clone())))
    return found


def read_from(model, ids, queries, states):
    """Logits of the last tokens, read from a cache of the given states."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(states):
        cache.update(key, value, layer)
    return model(input_ids=ids[:, -queries:], past_key_values=cache).logits


@pytest.mark.parametrize(("layer", "stream"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gradients_predict_the_kl_of_a_small_disturbance(layer, stream):
    model, ids, queries = build(), prompt(), 6
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-queries], use_cache=True).past_key_values
    states = [[x.keys.clone(), x.values.clone()] for x in cache.layers]
    leaf = states[layer][stream].requires_grad_()
    logits = read_from(model, ids, queries, states)
    generator = torch.Generator().manual_seed(2)
    error = 0.01 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) * leaf.detach().std()
    gradients = (
        torch.autograd.grad(drawn_score(logits, None, seed), leaf, retain_graph=True)[0] for seed in range(1500)
    )
    promised = [(gradient * error).sum().square() / 2 for gradient in gradients]
    with torch.no_grad():
        states[layer][stream] = leaf + error
        wanted, got = (x[0].log_softmax(-1) for x in (logits, read_from(model, ids, queries, states)))
    kl = (wanted.exp() * (wanted - got)).sum()
    assert float(torch.stack(promised).mean()) == pytest.approx(float(kl), rel=0.2)


def test_a_stream_that_the_output_barely_uses_is_cheap_to_lose():
    model = build()
    before = collect(Observations(model, [0, 1], {"input_ids": prompt()}))[0]
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 0.01
    after = collect(Observations(model, [0, 1], {"input_ids": prompt()}))[0]
    for stream in (0, 1):
        damped = after[1]["text"][stream].weights.sum() / before[1]["text"][stream].weights.sum()
        assert damped < 0.05
        assert after[0]["text"][stream].weights.sum() > 0.2 * before[0]["text"][stream].weights.sum()


def test_the_model_is_left_as_it_was_and_inference_mode_does_no_harm():
    model = build()
    expected = collect(Observations(model, [0, 1], {"input_ids": prompt()}))[0]
    with torch.inference_mode():
        found = collect(Observations(model, [0, 1], {"input_ids": prompt()}))[0]
    torch.testing.assert_close(found[1]["text"][0].weights, expected[1]["text"][0].weights)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reading_in_two_parts_gives_the_states_of_one():
    model, ids = build(), prompt(2)
    seen = observe(model, {"input_ids": ids}, [0, 1])
    assert seen.queries == TOKENS // 8
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True).past_key_values
    for layer in range(2):
        torch.testing.assert_close(seen.states[layer][0], whole.layers[layer].keys)
    shapes = {(layer, stream): g.shape for layer, stream, g in gradients_of(seen)}
    assert shapes == dict.fromkeys(product(range(2), range(2)), (2, 2, TOKENS - seen.queries, 6))


def test_no_vision_token_plays_a_token_to_come():
    model, ids = build(), prompt()
    ids[0, 40:45] = 9
    assert query_tokens(model.config, {"input_ids": ids}) == 3
    ids[0, -1] = 9
    assert query_tokens(model.config, {"input_ids": ids}) == 0
    seen = observe(model, {"input_ids": ids}, [0])
    assert gradients_of(seen) == [] and seen.without_gradients == TOO_SHORT


def test_padding_draws_no_labels():
    model, ids = build(), prompt(2)
    mask = torch.ones_like(ids)
    mask[1, -TOKENS // 8 :] = 0
    seen = observe(model, {"input_ids": ids, "attention_mask": mask}, [0])
    for _, _, gradient in gradients_of(seen):
        assert gradient[0].any() and not gradient[1].any()
    read, following = split({"input_ids": ids, "attention_mask": mask, "pixel_values": torch.zeros(1)}, 6)
    assert read["input_ids"].shape == read["attention_mask"].shape == (2, TOKENS - 6)
    assert following["attention_mask"].shape == (2, TOKENS) and "pixel_values" not in following


def test_an_input_that_is_none_is_passed_on():
    read, following = split({"input_ids": prompt(), "position_ids": None, "pixel_values": None}, 6)
    assert read["position_ids"] is None and read["pixel_values"] is None
    assert read["input_ids"].shape[1] == TOKENS - 6 and "position_ids" not in following


def test_tokens_to_come_see_the_pictures_beside_the_text_again():
    mask = torch.tensor([[[1, 0]] * 20 + [[0, 1]]])
    batch = {"input_ids": prompt(tokens=21), "pixel_values": torch.ones(1, 2, 3, 4, 4), "image_attention_mask": mask}
    read, following = split(batch, 5)
    assert read["image_attention_mask"].shape == (1, 16, 2)
    assert torch.equal(following["image_attention_mask"], torch.tensor([[[0, 1]] * 5]))
    assert following["pixel_values"] is batch["pixel_values"]
    assert pictures_beside({"input_ids": prompt(), "pixel_values": torch.ones(1, 3, 4, 4)}, 5) == {}
