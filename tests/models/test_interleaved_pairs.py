"""Models whose rotary embedding rotates interleaved pairs: relative keys end to end, eager, compiled and from a plan file."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Glm4Config, PreTrainedModel

import apack_compile
from apack_compile import AttentionPackConfig, Plan
from apack_compile.cache.cache import CompactedCache
from apack_compile.generate.decode_step import shape_of

SIZES = {
    "vocab_size": 64,
    "hidden_size": 80,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
# all 20 components of a head rotate, or the first 10
CONFIGS = {
    "cohere": lambda: CohereConfig(**SIZES),
    "glm4": lambda: Glm4Config(**SIZES, head_dim=20, pad_token_id=None),
}
ROWS, TOKENS, PADDING, STEPS = 3, 203, 37, 9


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(dtype)
    model.generation_config.eos_token_id = None
    return model


def inputs_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch whose first row is padded on the left."""
    ids = torch.randint(10, 64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


@cache
def plan_of(name: str, ratio: float, key_block: int = 64) -> Plan:
    model = build(name)
    apack_compile.optimize(model, AttentionPackConfig(ratio=ratio, key_block=key_block, compile="none", min_tokens=0))
    apack_compile.calibrate(model, [inputs_of(seed) for seed in (1, 2)])
    plan = apack_compile.plan_for(model, TOKENS)
    assert plan.rotation.interleaved and plan.rotation.block == key_block
    assert plan.rotation.frequencies.shape == ({"cohere": 10, "glm4": 5}[name],)
    return plan


def logits_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, and the logits they were chosen by."""
    out = model.generate(
        **inputs_of(), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@torch.no_grad()
def dense_logits(name: str, sequences: torch.Tensor) -> torch.Tensor:
    """What the dense model says at the places of generated tokens."""
    mask = torch.cat([inputs_of()["attention_mask"], torch.ones(ROWS, STEPS, dtype=torch.int64)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = build(name)(input_ids=sequences, attention_mask=mask, position_ids=positions).logits
    return logits[:, TOKENS - 1 : -1]


@pytest.mark.parametrize(
    ("name", "key_block", "compile"),
    [("cohere", 64, "inductor"), ("cohere", 7, "none"), ("glm4", 64, "eager")],
)
def test_fine_codes_give_the_dense_logits(name, key_block, compile):
    model = apack_compile.optimize(build(name), plan=plan_of(name, 1.3, key_block), compile=compile, strict=True)
    sequences, logits = logits_of(model)
    expected = dense_logits(name, sequences)
    assert 0 < (logits - expected).norm() < 0.04 * expected.norm()
    if compile != "none":
        assert {line.status for line in apack_compile.report(model).layers} == {"rewritten"}
        assert len(apack_compile.report(model).graphs) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_in_a_file_decodes_alike_and_compiled_decode_as_eager_decode(name, tmp_path):
    plan = plan_of(name, 1.3)
    plan.save(tmp_path / "plan")
    results = []
    for own, compile in ((plan, "none"), (Plan.load(tmp_path / "plan"), "none"), (plan, "eager")):
        results.append(logits_of(apack_compile.optimize(build(name), plan=own, compile=compile)))
    assert all(torch.equal(tokens, results[0][0]) for tokens, _ in results)
    assert torch.equal(results[1][1], results[0][1])
    torch.testing.assert_close(results[2][1], results[0][1], atol=2e-3, rtol=2e-3)


def cache_after(model: PreTrainedModel, *lengths: int) -> CompactedCache:
    """A cache that read the batch in chunks of so many tokens."""
    packed, given, at = apack_compile.new_cache(model, 8), inputs_of(), 0
    positions = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        for length in lengths:
            end = at + length
            model(
                input_ids=given["input_ids"][:, at:end],
                attention_mask=given["attention_mask"][:, :end],
                position_ids=positions[:, at:end],
                past_key_values=packed,
            )
            at = end
    return packed


def keys_of(packed: CompactedCache) -> torch.Tensor:
    layer = packed.packed_layers[1]
    none = torch.empty(ROWS, 2, 0, 20)
    return torch.ops.apack.unpack(none, none, *layer.state().flatten(), TOKENS)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_single_tokens_give_the_models_keys_back(name):
    model = build(name)
    with torch.no_grad():
        given = inputs_of()
        positions = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
        dense = model(**given, position_ids=positions).past_key_values.layers[1].keys
    apack_compile.optimize(model, plan=plan_of(name, 1.3), compile="none")
    real = given["attention_mask"].bool()
    for lengths in ((TOKENS,), (100, TOKENS - 100), (TOKENS - 3, 1, 1, 1)):
        keys = keys_of(cache_after(model, *lengths))
        error, size = ((x.transpose(1, 2)[real]).norm() for x in (keys - dense, dense))
        assert error < 0.05 * size, lengths


def test_a_plan_of_the_wrong_pairs_has_a_graph_of_its_own_and_fits_worse():
    plan = plan_of("cohere", 4)
    other = replace(plan, rotation=replace(plan.rotation, interleaved=False))
    assert shape_of(plan) != shape_of(other)
    model = build("cohere")
    outs = []
    for own in (plan, other):
        apack_compile.optimize(model, plan=own, compile="eager", strict=True)
        tokens, logits = logits_of(model)
        expected = dense_logits("cohere", tokens)
        outs.append(float((logits - expected).norm() / expected.norm()))
    assert outs[0] < outs[1]
