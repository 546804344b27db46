"""Which tokens matter, told from keys and values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.calibration.collect import Observations, collect
from apack_compile.calibration.find_rotation import find_rotation
from apack_compile.plan.coarse_rule import (
    NEWEST,
    RIDGE,
    WIDEST,
    RunningImportance,
    averages,
    feature_count,
    features,
    least_important,
    unrotated,
)
from apack_compile.plan.rotation import BLOCK

IMAGE = 9
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def prompt(tokens: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(10, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def with_pictures(ids: Tensor, tokens: int) -> dict[str, Tensor]:
    ids = ids.clone()
    ids[:, 20 : 20 + tokens] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_the_regression_is_ridge_regression_on_standardized_features(width, batches, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40 * batches, width, generator=generator).double() * torch.arange(1, width + 1) + 3
    energy = (0.3 * x @ torch.randn(width, generator=generator).double()).exp()
    energy[::7] = 0
    running = RunningImportance()
    for part in range(batches):
        running.add(x[part::batches].float(), energy[part::batches])
    used, target = x[energy > 0], energy[energy > 0].log()
    scale = used.std(0, correction=0)
    z = (used - used.mean(0)) / scale
    gram = z.mT @ z / len(z) + RIDGE * torch.eye(width).double()
    expected = torch.linalg.solve(gram, z.mT @ (target - target.mean()) / len(z)) / scale
    torch.testing.assert_close(running.finish().double(), expected, atol=1e-4, rtol=1e-3)
    assert running.count == len(used)


@given(st.integers(1, 3), st.integers(0, 20), st.floats(0.01, 0.99), st.integers(0, 10**6))
def test_the_share_with_the_lowest_scores_is_least_important(batch, tokens, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (batch, tokens), generator=generator).float()
    candidates = torch.rand(batch, tokens, generator=generator) < 0.7
    found = least_important(candidates, scores, share)
    assert not (found & ~candidates).any()
    for row in range(batch):
        of_row = candidates[row].nonzero().flatten().tolist()
        ranked = sorted(of_row, key=lambda t: float(scores[row, t]))
        count = int((torch.tensor([len(of_row)]) * share).long())
        assert found[row].nonzero().flatten().tolist() == sorted(ranked[:count])


def test_features_are_components_and_norms():
    key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    found = features(key.bfloat16(), value.bfloat16())
    assert found.shape == (2, 5, 3 * 4 + 3 * 6 + 3 + 3) and found.dtype == torch.float32
    token = [
        *key[1, :, 2].flatten(),
        *value[1, :, 2].flatten(),
        *key[1, :, 2].norm(dim=-1),
        *value[1, :, 2].norm(dim=-1),
    ]
    torch.testing.assert_close(found[1, 2], torch.stack(token), atol=0.05, rtol=0.05)


@given(st.integers(1, 40), st.sampled_from((5, 64, 128, 600)))
def test_many_heads_are_averaged(heads, head_dim):
    states = torch.randn(1, heads, 2, head_dim, generator=torch.Generator().manual_seed(heads))
    found = features(states, states[..., :3])
    means = averages(heads, head_dim)
    assert heads % means == 0 and (means == heads or means * head_dim <= WIDEST or means == 1)
    assert found.shape[-1] == feature_count(heads, head_dim, 3) == means * head_dim + heads * 5
    share = heads // means
    torch.testing.assert_close(found[0, 1, :head_dim], states[0, :share, 1].mean(0))


def test_unrotated_keys_of_a_token_are_the_same_wherever_it_stands():
    model = small_model()
    rotation, _ = find_rotation(model, [0, 1], {"input_ids": prompt(40)}, BLOCK)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 7), past_key_values=cache)
    keys = cache.layers[0].keys
    still = unrotated(keys, torch.arange(40)[None, :, None], rotation)
    torch.testing.assert_close(still, still[:, :, :1].expand_as(still), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(keys, keys[:, :, :1].expand_as(keys), atol=1e-2)
    assert unrotated(keys, torch.arange(40)[None, :, None], None) is keys


def test_a_rule_needs_tokens_enough():
    model = small_model()
    width = 2 * (2 * 16 * 2 + 2 * 2)
    enough, few = prompt(2 * width + NEWEST), prompt(width)
    assert set(collect(Observations(model, [0, 1], {"input_ids": few}))[1]) == set()
    statistics, rules, _ = collect(Observations(model, [0, 1], {"input_ids": enough}))
    assert set(rules) == {"text"} and set(statistics[0]) == {"text", "coarse_text", "fine_text"}
    several = [{"input_ids": prompt(150, seed=seed)} for seed in range(4)]
    statistics, rules, _ = collect(Observations(model, [0, 1], several))
    assert set(statistics[1]) == {"text", "coarse_text", "fine_text"}


def test_the_report_says_where_calibration_saw_too_few_tokens():
    model = apack_compile.optimize(small_model(), ratio=6, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": prompt(100)})
    assert any("no coarse text tokens" in note for note in apack_compile.report(model).notes)
    assert apack_compile.plan_for(model, 1000).coarse is None
    apack_compile.calibrate(model, [{"input_ids": prompt(200, seed=seed)} for seed in range(3)])
    assert not any("no coarse text tokens" in note for note in apack_compile.report(model).notes)


@pytest.mark.parametrize(("ratio", "tokens", "coarse"), ((4, 1000, False), (6, 1000, True), (6, 700, False)))
def test_a_plan_tells_tokens_apart_where_bytes_are_few(ratio, tokens, coarse):
    model = apack_compile.optimize(small_model(), ratio=3, compile="none", min_tokens=0)
    apack_compile.calibrate(model, [{"input_ids": prompt(200, seed=seed)} for seed in range(3)])
    apack_compile.optimize(model, ratio=ratio, compile="none", min_tokens=0)
    plan = apack_compile.plan_for(model, tokens)
    assert (plan.coarse is not None) == coarse and len(plan.layers[0].streams) == (6 if coarse else 4)
    if coarse:
        bits = {name: s.bands.counts for name, s in plan.layers[0].named.items()}
        assert sum(bits["text_value"]) >= sum(bits["coarse_value"])


def test_statistics_serve_plans_that_tell_fewer_modalities_apart():
    model = apack_compile.optimize(small_model(), ratio=6, compile="none", min_tokens=0)
    apack_compile.calibrate(model, [{"input_ids": prompt(200, seed=seed)} for seed in range(3)])
    for coarse, told in (((), False), (("text",), True)):
        apack_compile.optimize(model, AttentionPackConfig(ratio=6, coarse=coarse, compile="none", min_tokens=0))
        assert (apack_compile.plan_for(model, 1000).coarse is not None) == told
    apack_compile.optimize(model, AttentionPackConfig(ratio=6, coarse=("text", "vision"), compile="none", min_tokens=0))
    with pytest.raises(RuntimeError, match="no calibrated statistics"):
        apack_compile.plan_for(model, 1000)


@pytest.mark.parametrize("modality", ("vision", "text"))
def test_one_graph_decodes_from_three_packed_segments(modality):
    torch._dynamo.reset()
    model = small_model()
    model.config.image_token_id = IMAGE
    model.generation_config.eos_token_id = None
    pictures = 120 if modality == "vision" else 0
    apack_compile.optimize(model, AttentionPackConfig(ratio=6, compile="none", coarse=(modality,), min_tokens=0))
    apack_compile.calibrate(model, [with_pictures(prompt(240, seed=seed), pictures) for seed in range(3)])
    plan = apack_compile.plan_for(model, 1_000, pictures / 240)
    assert plan.coarse.modality == modality
    prompts = [with_pictures(prompt(length, rows=2, seed=9), pictures) for length in (240, 301)]
    said = {}
    for mode in ("none", "eager"):
        apack_compile.optimize(model, plan=plan, compile=mode, strict=True)
        said[mode] = [model.generate(**inputs, max_new_tokens=40, do_sample=False) for inputs in prompts]
    assert all(torch.equal(*pair) for pair in zip(*said.values(), strict=True))
    report = apack_compile.report(model)
    assert len(report.graphs) == 1 and [line.status for line in report.layers] == ["rewritten"] * 2
    assert report.bytes["coarse"] == {"modality": modality, "share": plan.coarse.share}
    assert f"75% of its {modality} tokens" in str(report)


def test_which_modalities_are_told_apart_is_chosen():
    for value in ("text", ["sound"], 3):
        with pytest.raises(ValueError, match=r"coarse=.* must hold"):
            AttentionPackConfig(ratio=6, coarse=value, min_tokens=0)
    config = AttentionPackConfig(ratio=6, coarse=["vision", "text"], compile="none", min_tokens=0)
    assert AttentionPackConfig.from_json(config.to_json()) == config
    model = small_model()
    model.config.image_token_id = IMAGE
    inputs = [with_pictures(prompt(300, seed=seed), 120) for seed in range(3)]
    for coarse, share, expected in (
        ((), 0.6, None),
        (("text",), 0.6, None),
        (("text",), 0.3, "text"),
        (("vision", "text"), 0.6, "vision"),
    ):
        apack_compile.optimize(model, AttentionPackConfig(ratio=6, coarse=coarse, compile="none", min_tokens=0))
        apack_compile.calibrate(model, inputs)
        plan = apack_compile.plan_for(model, 1000, share)
        assert (None if plan.coarse is None else plan.coarse.modality) == expected
