"""Preset "attentionpack" in layers with a small window: packed where that takes fewer bytes than it saves, else left as they are."""

import re

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

import apack_compile
from apack_compile import AttentionPackConfig, AttentionPackOptions, Plan
from apack_compile.config import MIN_TAIL_SLOTS

SLIDING, FULL = "sliding_attention", "full_attention"
RANKS = AttentionPackConfig(min_tokens=0).ranks


def sizes(window: int) -> dict:
    return {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": window,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def gemma(window: int, types=(SLIDING, SLIDING, FULL)) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes(window), num_hidden_layers=len(types), layer_types=list(types))
    model = Gemma3ForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def packing(rank: int | list[int], **options) -> AttentionPackConfig:
    return AttentionPackConfig(
        preset="attentionpack",
        ranks=dict.fromkeys(RANKS, rank),
        compile="none",
        attentionpack=AttentionPackOptions(**options),
    )


def decoded(model, **kwargs) -> torch.Tensor:
    ids = torch.randint(2, 64, (1, 311), generator=torch.Generator().manual_seed(0))
    return model.generate(ids, **{"max_new_tokens": 70, "do_sample": False, **kwargs})


def group_ratio(cache) -> float:
    """16-bit bytes of a dense layer with the window over what its group of layers holds."""
    layers = next(group for group in cache.groups if group.window is not None).layers
    dense = sum(2 * 2 * layer.index.window * layer.num_heads * 64 for layer in layers)
    return dense / sum(
        t.nbytes for layer in layers for t in (*layer.dense_tensors(), *layer.packed_tensors(), *layer.basis_tensors())
    )


@pytest.mark.parametrize(
    ("window", "rank", "options", "packed"),
    [
        (48, 64, {}, False),
        (48, 16, {}, False),
        (48, 4, {}, True),
        (130, 64, {}, False),
        (130, 64, {"bits": 4}, True),
        (130, 16, {}, True),
        (330, 64, {}, True),
    ],
)
def test_layers_with_a_window_never_hold_more_than_dense_ones(window, rank, options, packed):
    model = apack_compile.optimize(gemma(window), packing(rank, **options))
    cache = apack_compile.new_cache(model)
    decoded(model, past_key_values=cache)
    lines = apack_compile.report(model).layers
    assert [line.status for line in lines] == ["packed" if packed else "dense"] * 2 + ["packed"]
    if packed:
        assert group_ratio(cache) > 1
    else:
        said = rf"{SLIDING}: its window of {window} tokens would take [12]\d\d% of the dense bytes with preset='attentionpack'"
        assert re.fullmatch(said, lines[0].reason)


def test_a_tail_is_an_eighth_of_a_window_or_the_fewest_that_are_allowed():
    for window, tail in ((330, 41), (48, MIN_TAIL_SLOTS), (4_000, 64)):
        model = apack_compile.optimize(gemma(window), packing(4))
        plan = apack_compile.plan_for(model, 5_000)
        assert (plan.tail_slots, plan.windows[window].tail_slots) == (64, tail)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prefill_chunk_size": 100}, {"prompt_lookup_num_tokens": 4}])
def test_tokens_of_a_model_whose_small_windows_stay_dense(kwargs):
    """With every component kept, what differs from the dense model is 16-bit rounding in one layer."""
    model = gemma(48)
    dense = decoded(model, **kwargs)
    apack_compile.optimize(model, packing(128, full=1.0, partial=1.0))
    assert torch.equal(decoded(model, **kwargs), dense)
    assert [line.status for line in apack_compile.report(model).layers] == ["dense", "dense", "packed"]


def test_ranks_by_layer_count_the_layers_that_stay_dense():
    ranks = [64, 64, 24]
    model = apack_compile.optimize(gemma(48), packing(ranks))
    plan = apack_compile.plan_for(model, 300)
    assert list(plan.layers) == [2] and plan.layers[2].text_key.bands.components == 24
    with pytest.raises(ValueError, match="text_key has 2 ranks, but 3 layers can be packed"):
        apack_compile.optimize(gemma(48), packing([64, 24]))


def test_a_saved_plan_leaves_them_dense_too(tmp_path):
    model = apack_compile.optimize(gemma(48), packing(64))
    expected = decoded(model)
    apack_compile.plan_for(model, 300).save(tmp_path / "plan")
    model = apack_compile.optimize(gemma(48), plan=Plan.load(tmp_path / "plan"), compile="none")
    assert torch.equal(decoded(model), expected)
    assert [line.status for line in apack_compile.report(model).layers] == ["dense", "dense", "packed"]


def test_a_model_that_would_have_no_layer_packed_is_refused():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**sizes(48), num_hidden_layers=2)).eval()
    with pytest.raises(
        ValueError, match=r"none of its 2 layers can be packed \(sliding_attention: its window of 48 tokens"
    ):
        apack_compile.optimize(model, preset="attentionpack")
    assert "generate" not in vars(model)
