"""Preset "snapkv": what is kept over turns, drafts, beams and batches, and what a step reads."""

import pytest
import torch
from llava_and_draft import greedy, llava, picture
from transformers.cache_utils import DynamicCache
from vlms import IMAGE

import apack_compile
from apack_compile import AttentionPackConfig, SnapKVOptions
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.plan.presets.base import half_plan
from apack_compile.plan.source import PlanSource
from apack_compile.plan.tiers import Prompt, Tokens, most_scored

WINDOW, KERNEL = 9, 5
LONG = {"input_ids": torch.randint(5, 90, (2, 97), generator=torch.Generator().manual_seed(0))}


def packing(kept=0.4, compile="none"):
    options = SnapKVOptions(kept, WINDOW, KERNEL)
    return apack_compile.optimize(llava(), AttentionPackConfig(preset="snapkv", options=options, compile=compile))


def held(cache):
    """Positions of each layer's tokens, by row."""
    rows = []
    for layer in cache.packed_layers:
        positions = torch.cat(layer.tiers.positions, 1)
        rows.append([sorted(p for p in row if 0 <= p < int(cache.get_seq_length())) for row in positions.tolist()])
    return rows


def test_a_share_of_both_modalities_is_kept_with_the_window():
    model, inputs = packing(), picture([60, 40])
    cache = apack_compile.new_cache(model)
    greedy(model, inputs, 1, past_key_values=cache)
    tokens = inputs["input_ids"].shape[1]
    for (row,) in held(cache):
        assert len(row) == -(-tokens * 4 // 10)
        assert row[-WINDOW:] == list(range(tokens - WINDOW, tokens))
    kept_pictures = {int((inputs["input_ids"][0, row] == IMAGE).sum()) for (row,) in held(cache)}
    assert len({tuple(row) for (row,) in held(cache)}) > 1 and kept_pictures
    assert apack_compile.report(model).bytes["ratio"] > 1.5


def test_generated_tokens_stay_and_a_further_prompt_is_scored_anew():
    model = packing()
    cache = apack_compile.new_cache(model)
    first = greedy(model, LONG, 12, past_key_values=cache)
    length = int(cache.get_seq_length())
    assert length == 108 and all(row[-11:] == list(range(97, 108)) for rows in held(cache) for row in rows)
    longer = torch.cat([first, LONG["input_ids"][:, :60]], 1)
    greedy(model, {"input_ids": longer}, 1, past_key_values=cache)
    for rows in held(cache):
        for row in rows:
            assert len(row) == -(-169 * 4 // 10) and row[-WINDOW:] == list(range(160, 169))


def test_a_short_prompt_and_a_short_turn_lose_nothing():
    model = packing()
    cache = apack_compile.new_cache(model)
    out = greedy(model, {"input_ids": LONG["input_ids"][:, :WINDOW]}, 5, past_key_values=cache)
    greedy(model, {"input_ids": torch.cat([out, LONG["input_ids"][:, :20]], 1)}, 2, past_key_values=cache)
    end = int(cache.get_seq_length())
    assert held(cache) == [[list(range(end))] * 2] * len(cache.packed_layers)


@pytest.mark.parametrize(
    ("inputs", "how"),
    [
        (LONG, {}),
        (LONG, {"num_beams": 3}),
        (LONG, {"prefill_chunk_size": 40}),
        (picture([60, 40]), {}),
        (picture([60, 40], [30, 20]), {"num_beams": 3}),
    ],
    ids=["text", "beams", "chunks", "pictures", "padded-beams"],
)
def test_compiled_tokens_are_those_of_eager_steps(inputs, how):
    found = [greedy(packing(compile=compile), inputs, 20, **how) for compile in ("none", "eager")]
    assert torch.equal(*found)


@pytest.mark.parametrize("tokens", [3, 10, 45])
@pytest.mark.parametrize("inputs", [LONG, picture([60, 40])], ids=["text", "pictures"])
def test_drafts_change_no_token(inputs, tokens):
    inputs = {name: x[:1] for name, x in inputs.items()}
    model = packing()
    expected = greedy(model, inputs, 30)
    cache = apack_compile.new_cache(model)
    assert torch.equal(greedy(model, inputs, 30, past_key_values=cache, prompt_lookup_num_tokens=tokens), expected)


def test_what_is_cropped_can_be_told_again():
    model = packing()
    cache, plain = apack_compile.new_cache(model), apack_compile.new_cache(model)
    out = greedy(model, LONG, 10, past_key_values=cache)
    greedy(model, LONG, 10, past_key_values=plain)
    cache.crop(-6)
    kept = out[:, : int(cache.get_seq_length())]
    again = torch.cat([kept, torch.full((2, 3), 7)], 1)
    said = greedy(model, {"input_ids": again}, 5, past_key_values=cache)
    assert held(cache)[0][0] == [p for p in held(plain)[0][0] if p < kept.shape[1]] + list(range(100, 107))
    assert said.shape[1] == again.shape[1] + 5


def test_without_a_seen_attention_every_token_is_kept_and_said_so():
    model = llava()
    model.set_attn_implementation("eager")
    apack_compile.optimize(model, preset="snapkv", compile="none")
    cache = apack_compile.new_cache(model)
    greedy(model, LONG, 2, past_key_values=cache)
    assert held(cache)[0][0] == list(range(98))
    assert any("no scaled_dot_product_attention was seen" in note for note in apack_compile.report(model).notes)


def test_equal_scores_keep_the_oldest_token_in_whatever_order_slots_are():
    place = torch.tensor([[3, 0, 2, 1, 4]])
    held = torch.tensor([[True, True, True, True, False]])
    tokens = Tokens(("text",), torch.ones(1, 5), held, place, held.sum(1), held.sum(1))
    assert most_scored(tokens.importance, torch.tensor([2]), tokens).tolist() == [[False, True, False, True, False]]


def test_a_token_is_scored_by_its_neighbours_before_the_window():
    attention = torch.zeros(1, 2, 12)
    attention[0, 0, 3], attention[0, 1, 3], attention[0, 1, 10] = 0.25, 0.5, 0.9
    found = SnapKVOptions(window=2, kernel=5).importance(Prompt(attention, torch.tensor([10]), torch.empty(0)))
    assert found.tolist() == [[0.0, *[0.75] * 5, *[0.0] * 6]]


class ByKeys(SnapKVOptions):
    """Keeps the tokens with the longest keys instead."""

    def importance(self, prompt):
        return prompt.key.norm(dim=-1).mean(1)


def test_a_score_may_be_of_keys():
    plan = half_plan([0], ByKeys(0.4, WINDOW, KERNEL))
    cache = CompactedCache([LayerKind(0, "full_attention", None)], DynamicCache(), PlanSource(given=plan))
    query, key, value = torch.randn(3, 1, 2, 60, 8, generator=torch.Generator().manual_seed(0))
    cache.show_attention(True)
    torch.nn.functional.scaled_dot_product_attention(query, *cache.update(key, value, 0), is_causal=True)
    longest = key[0, :, : 60 - WINDOW].norm(dim=-1).mean(0).topk(24 - WINDOW).indices
    assert held(cache)[0][0] == sorted([*longest.tolist(), *range(60 - WINDOW, 60)])
