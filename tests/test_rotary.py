"""Relative keys: which models' keys rotate as we know it, and what rotating them back does to a cache."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Glm4Config,
    GPT2Config,
    LlamaConfig,
    Qwen3_5TextConfig,
    StableLmConfig,
)
from transformers.cache_utils import DynamicCache

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.calibration.collect import Observations, collect, rotations_of_tokens
from apack_compile.calibration.find_rotation import find_rotation
from apack_compile.kernels.rotations import rotated, rotations_of_slots
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.rotation import BLOCK, KeyRotation, rotary_start, rotations_at, rotations_of_blocks

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model_of(config: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(tokens: int = 300, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("config", "pairs", "interleaved"),
    [
        (LlamaConfig(**SIZES), 8, False),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), 8, False),
        (StableLmConfig(**SIZES, partial_rotary_factor=0.25), 2, False),
        (CohereConfig(**SIZES), 8, True),
        (Ernie4_5Config(**SIZES, head_dim=20), 10, True),
        (Glm4Config(**SIZES, head_dim=20, pad_token_id=None), 5, True),
    ],
    ids=("whole head", "scaled", "part of a head", "interleaved", "interleaved, Ernie", "interleaved part of a head"),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_rotation_of_a_rotary_embedding_is_found(config, pairs, interleaved, dtype):
    rotation, reason = find_rotation(model_of(config).to(dtype), [0, 1], {"input_ids": prompt()}, BLOCK)
    assert rotation is not None and rotation.frequencies.shape == (pairs,), reason
    assert rotation.frequencies.dtype == torch.float32
    assert rotation.interleaved == interleaved == ("interleaved pairs" in reason) and "inv_freq" in reason


def test_the_rotation_is_found_behind_linear_layers_that_make_a_repeated_token_differ():
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = Qwen3_5TextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        **linear,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    )
    model = model_of(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    rotation, reason = find_rotation(model, [1, 3], {"input_ids": prompt()}, BLOCK)
    assert rotation is not None and rotation.frequencies.shape == (2,), reason
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4), "no rotary frequencies"),
        (Cohere2Config(**SIZES, layer_types=["full_attention"] * 2), "do not rotate with their position"),
        (
            Cohere2Config(**SIZES, layer_types=["sliding_attention", "full_attention"]),
            "do not rotate by .*inv_freq alone",
        ),
    ],
    ids=("no rotary embedding", "layers without one", "one layer without one"),
)
def test_keys_that_rotate_otherwise_are_left_with_a_reason(config, why):
    rotation, reason = find_rotation(model_of(config), [0, 1], {"input_ids": prompt()}, BLOCK)
    assert rotation is None and re.search(why, reason)


@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 5), st.integers(1, 4))
def test_rotating_back_undoes_rotating_and_keeps_scores(batch, slots, block, pairs):
    generator = torch.Generator().manual_seed(slots)
    positions = torch.randint(0, 5000, (batch, slots), generator=generator, dtype=torch.int32)
    rotation = KeyRotation(torch.rand(pairs, generator=generator), block)
    start = torch.zeros(batch, 1, dtype=torch.int64)
    coordinates = TokenCoordinates.starting_at(start)
    rotations = rotations_of_slots(rotations_of_blocks(positions, coordinates, rotation), block, torch.arange(slots))
    keys, query = (torch.randn(batch, slots, 2 * pairs + 3, generator=generator).double() for _ in range(2))
    back = rotated(keys, rotations, back=True)
    torch.testing.assert_close(rotated(back, rotations), keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        (rotated(query, rotations, back=True) * back).sum(-1), (query * keys).sum(-1), atol=1e-5, rtol=0
    )
    if slots:
        expected = rotations_at(positions[:, :1] - start, rotation.frequencies)
        torch.testing.assert_close(rotations[:, : min(block, slots)], expected.expand(-1, min(block, slots), -1, -1))


def test_calibration_and_cache_rotate_a_token_by_the_same_anchor():
    flags = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.4
    rotation, start = KeyRotation(torch.tensor([1.0, 0.01]), 16), torch.tensor([[0], [3], [7]])
    coordinates = TokenCoordinates.starting_at(start)
    by_token = rotations_of_tokens(flags, coordinates.at(torch.arange(200).expand(3, -1)), rotation)
    for row in range(3):
        positions = flags[row].nonzero().flatten()[None].to(torch.int32)
        blocks = rotations_of_blocks(positions, TokenCoordinates.starting_at(start[row : row + 1]), rotation)
        expected = rotations_of_slots(blocks, rotation.block, torch.arange(positions.shape[1]))[0]
        assert torch.equal(by_token[row][flags[row]], expected)


@pytest.mark.parametrize("config", (LlamaConfig, CohereConfig), ids=("halves", "interleaved"))
def test_fewer_components_explain_keys_that_are_rotated_back(config):
    model, inputs = model_of(config(**SIZES)), {"input_ids": prompt(600)}
    rotation, _ = find_rotation(model, [0, 1], inputs, BLOCK)
    plain, relative = (collect(Observations(model, [0, 1], inputs, t))[0] for t in (None, rotation))
    for layer in range(2):
        shares = []
        for statistics in (plain, relative):
            variance = statistics[layer]["text"][0].spectrum.deviation.square().flatten()
            shares.append(float(variance[:16].sum() / variance.sum()))
        assert shares[1] > shares[0] + 0.05
        values = [s[layer]["text"][1].spectrum.deviation for s in (plain, relative)]
        assert torch.equal(*values)


def held_by(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[list[torch.Tensor]]:
    """Codes of the text keys of each layer."""
    cache = apack_compile.new_cache(model, 8)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache)
    assert cache.index.plan.rotation.block == BLOCK
    return [layer.packed_tensors()[4:6] for layer in cache.packed_layers]


def test_left_padding_does_not_change_what_is_stored():
    model = apack_compile.optimize(model_of(LlamaConfig(**SIZES)), ratio=3, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": prompt(300, seed=1)})
    apack_compile.optimize(model, plan=apack_compile.plan_for(model, 300), compile="none")
    ids = prompt(300)
    padded, mask = torch.nn.functional.pad(ids, (37, 0)), torch.ones(1, 337, dtype=torch.int64)
    mask[:, :37] = 0
    assert rotary_start(mask == 0).item() == 37
    for (codes, _), (expected, _) in zip(held_by(model, padded, mask), held_by(model, ids, mask[:, 37:]), strict=True):
        slots = 300 - 4
        different = (codes[:, :, :slots] != expected[:, :, :slots]).float().mean()
        assert different < 0.01, "a code near a tie may differ"


def test_the_report_says_how_keys_are_packed_and_optimize_again_keeps_it():
    model = apack_compile.optimize(model_of(LlamaConfig(**SIZES)), ratio=3, compile="none", min_tokens=0)
    assert apack_compile.report(model).keys == ""
    apack_compile.calibrate(model, {"input_ids": prompt(seed=1)})
    said = apack_compile.report(model).keys
    assert said.startswith("rotated back to the start of their 64 slots, by") and said in str(
        apack_compile.report(model)
    )
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    assert apack_compile.report(model).keys == said
    assert apack_compile.plan_for(model, 300).rotation is not None
    apack_compile.optimize(model, preset="lossless", compile="none")
    assert apack_compile.report(model).keys == "" and apack_compile.plan_for(model, 300).rotation is None
    other = AttentionPackConfig(ratio=4, key_block=0, compile="none", min_tokens=0)
    apack_compile.optimize(model, other)
    with pytest.raises(RuntimeError, match="no calibrated statistics"):
        apack_compile.plan_for(model, 300)
    apack_compile.calibrate(model, {"input_ids": prompt(seed=1)})
    assert apack_compile.report(model).keys == "stored as they are: key_block=0"
    assert apack_compile.plan_for(model, 300).rotation is None
    apack_compile.optimize(model, AttentionPackConfig(ratio=2, head_groups=2, compile="none", min_tokens=0))
    apack_compile.calibrate(model, {"input_ids": prompt(seed=1)})
    plan = apack_compile.plan_for(model, 300)
    assert plan.groups == 2 and plan.bases[0][2].mean.shape == (1, 2, 16)
    model.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert apack_compile.report(model).bytes["ratio"] > 1.5
    gpt = apack_compile.optimize(
        model_of(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)), ratio=3, min_tokens=0
    )
    apack_compile.calibrate(gpt, {"input_ids": prompt(seed=1)})
    assert apack_compile.report(gpt).keys == "stored as they are: the model has no rotary frequencies"


def test_the_demo_reads_back_keys_that_were_rotated():
    model = apack_compile.optimize(model_of(LlamaConfig(**SIZES)), ratio=2, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": prompt(seed=1)})
    cache, exact = apack_compile.new_cache(model, 8), DynamicCache(config=model.config)
    with torch.no_grad():
        for one in (cache, exact):
            model(input_ids=prompt(), past_key_values=one)
    layer = cache.packed_layers[0]
    none = (layer.first.key[:, :, :0], layer.first.value[:, :, :0])
    key, _ = torch.ops.apack.unpack.default(*none, *layer.state().flatten(), 300)
    wanted = exact.layers[0].keys
    assert (key - wanted).norm() < 0.3 * (wanted - wanted.mean(2, keepdim=True)).norm()
