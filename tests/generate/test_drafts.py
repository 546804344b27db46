"""Assisted and prompt-lookup decoding: what was drafted and not taken is cropped, whatever it was."""

import pytest
import torch
from llava_and_draft import calibrated, draft, greedy, llava, picture
from preset_rows import TIERED_PRESETS
from vlms import IMAGE, build

import apack_compile
from apack_compile.cache.layer import MAX_APPEND

REPEATED = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12] * 12])}


@pytest.mark.parametrize("optimized_draft", [False, True], ids=["dense-draft", "optimized-draft"])
@pytest.mark.parametrize("compile", ["none", "eager"])
def test_an_assistant_changes_no_token(compile, optimized_draft):
    model, assistant, inputs = llava(), draft(), picture()
    dense = greedy(model, inputs, 40)
    # such a token is no picture when it was generated
    assert IMAGE in dense[0, -40:]
    calibrated(model, compile, preset="lossless")
    if optimized_draft:
        calibrated(assistant, compile, preset="lossless")
    assert torch.equal(greedy(model, inputs, 40, assistant_model=assistant), dense)
    assert (apack_compile.report(assistant).bytes is not None) if optimized_draft else True


@pytest.mark.parametrize("setting", [{"ratio": 4}, *TIERED_PRESETS], ids=str)
def test_lossy_caches_decode_from_drafts(setting):
    model, inputs = calibrated(llava(), **setting), picture([60, 40])
    length = inputs["input_ids"].shape[1] + 40
    for drafts in ({"assistant_model": draft()}, {"prompt_lookup_num_tokens": 5}):
        cache = apack_compile.new_cache(model)
        assert greedy(model, inputs, 40, past_key_values=cache, **drafts).shape[1] == length
        # the last token was never stored; what was drafted in vain is gone
        assert int(cache.get_seq_length()) in (length - 1, length)


@pytest.mark.parametrize("setting", [{"preset": "lossless"}, {"ratio": 4}], ids=str)
def test_more_drafted_tokens_than_an_appended_chunk_holds_can_be_cropped(setting):
    model, assistant = llava(), draft()
    settings = assistant.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 45, "constant"
    settings.assistant_confidence_threshold = 0
    dense = greedy(model, REPEATED, 60)
    calibrated(model, **setting)
    drafted = greedy(model, REPEATED, 60, assistant_model=assistant)
    looked_up = greedy(model, REPEATED, 60, prompt_lookup_num_tokens=50)
    if "preset" in setting:
        assert torch.equal(drafted, dense) and torch.equal(looked_up, dense)
    assert drafted.shape == looked_up.shape == dense.shape


def test_a_draft_model_with_sliding_layers_keeps_what_it_may_have_to_crop():
    assistant, _ = build("gemma3")
    model = llava()
    dense = greedy(model, REPEATED)
    try:
        greedy(model, REPEATED, assistant_model=assistant)
    except RuntimeError:
        pytest.skip("this transformers cannot crop the sliding layers of a dense cache either")
    calibrated(model, preset="lossless")
    calibrated(assistant, preset="lossless")
    assert torch.equal(greedy(model, REPEATED, assistant_model=assistant), dense)


def test_drafts_of_the_model_s_first_layers_are_refused():
    model = calibrated(llava(), preset="lossless")
    with pytest.raises(ValueError, match="assistant_early_exit=1: drafts come from the model with fewer layers"):
        greedy(model, picture(), assistant_early_exit=1)


def test_a_crop_past_the_newest_tokens_is_refused_and_changes_nothing():
    model, inputs = calibrated(llava(), preset="lossless"), picture([60, 40])
    cache = apack_compile.new_cache(model)
    greedy(model, inputs, 5, past_key_values=cache)
    held = int(cache.get_seq_length())
    with pytest.raises(ValueError, match=f"crop: cannot remove {cache.croppable + 1} of {held} tokens"):
        cache.crop(-cache.croppable - 1)
    assert int(cache.get_seq_length()) == held


def contrary(tokens: int):
    """A draft model that always names the token that the model is least likely to say, so many at a time."""
    model = llava()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    settings = model.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = tokens, "constant"
    settings.assistant_confidence_threshold = 0
    return model


def check_same_importance(one, other) -> None:
    """Both caches hold the same vision and text tokens, and find them as important."""
    held = int(one.get_seq_length())
    for left, right in zip(one.packed_layers, other.packed_layers, strict=True):
        found, wanted = (
            [
                {p: x for p, x in zip(positions[0].tolist(), known[0].tolist(), strict=True) if 0 <= p < held}
                for positions, known in zip(tiers.positions[1:], tiers.importance, strict=True)
            ]
            for tiers in (left.tiers, right.tiers)
        )
        assert found == [pytest.approx(expected, rel=1e-3, abs=1e-5) for expected in wanted]


@pytest.mark.parametrize("tokens", [1, 9, 31, 32, 45])
@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pictures"])
def test_drafts_of_which_nothing_is_accepted_change_no_eviction(tokens, pictures):
    model = calibrated(llava(), preset="a-vl")
    ids = torch.randint(5, 90, (1, 97), generator=torch.Generator().manual_seed(0))
    inputs = picture([61, 40]) if pictures else {"input_ids": ids}
    plain, cache = apack_compile.new_cache(model), apack_compile.new_cache(model)
    greedily = greedy(model, inputs, 43, past_key_values=plain)
    drafted = greedy(model, inputs, 43, past_key_values=cache, assistant_model=contrary(tokens))
    assert torch.equal(drafted, greedily)
    if not (pictures and tokens >= MAX_APPEND):
        # a longer draft reads every picture that is kept, which a step does not
        check_same_importance(cache, plain)


@pytest.mark.parametrize("tokens", [3, 10, 32, 77])
@pytest.mark.parametrize("inputs", [REPEATED, picture([60, 40])], ids=["text", "pictures"])
def test_a_looked_up_draft_of_any_length_is_not_evicted(tokens, inputs):
    model = calibrated(llava(), preset="a-vl")
    cache = apack_compile.new_cache(model)
    out = greedy(model, inputs, 61, past_key_values=cache, prompt_lookup_num_tokens=tokens)
    length = inputs["input_ids"].shape[1] + 61
    assert out.shape[1] == length and int(cache.get_seq_length()) == length - 1
    text = int((out != IMAGE).sum()) - 1
    for layer in cache.packed_layers:
        layer.evict([("text",)], length - 1)
        held = layer.tiers.positions[2][0]
        assert int(layer.tiers.seen[0, 1]) == text
        assert int(((held >= 0) & (held < length - 1)).sum()) == -(-text // 2)


@pytest.mark.parametrize("setting", TIERED_PRESETS, ids=str)
def test_an_assistant_that_packs_crops_as_many_tokens_as_it_drafts(setting):
    model, assistant = llava(), contrary(45)
    dense = greedy(model, REPEATED, 50)
    calibrated(model, preset="lossless")
    calibrated(assistant, **setting)
    assert torch.equal(greedy(model, REPEATED, 50, assistant_model=assistant), dense)


def test_a_cache_forgets_and_evicts_again_when_a_drafting_call_is_over():
    model = calibrated(llava(), preset="a-vl")
    cache = apack_compile.new_cache(model)
    first = greedy(model, REPEATED, 9, past_key_values=cache, prompt_lookup_num_tokens=5)
    assert not cache.is_recording
    greedy(model, {"input_ids": first}, 43, past_key_values=cache)
    assert cache.packed_layers[0].tiers.end > first.shape[1]


@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 35}, {"assistant_model": True}], ids=str)
def test_a_prompt_that_drafting_would_store_again_is_refused(drafts):
    model, plain = calibrated(llava(), preset="a-vl"), calibrated(llava(), preset="a-vl")
    drafts = {name: llava() if value is True else value for name, value in drafts.items()}
    cache, other = apack_compile.new_cache(model), apack_compile.new_cache(plain)
    first = greedy(model, REPEATED, 9, past_key_values=cache)
    assert torch.equal(greedy(plain, REPEATED, 9, past_key_values=other), first)
    held = int(cache.get_seq_length())
    message = (
        f"^{next(iter(drafts))}: the cache holds {held} tokens, .* prompt of {first.shape[1]} again; pass a new cache"
    )
    with pytest.raises(ValueError, match=message):
        greedy(model, {"input_ids": first}, 31, past_key_values=cache, **drafts)
    assert torch.equal(
        greedy(model, {"input_ids": first}, 31, past_key_values=cache),
        greedy(plain, {"input_ids": first}, 31, past_key_values=other),
    )


def test_a_loop_of_one_s_own_drafts_as_generate_does():
    model = calibrated(llava(), preset="a-vl")
    ids = torch.randint(5, 90, (1, 71), generator=torch.Generator().manual_seed(1))
    plain, cache = apack_compile.new_cache(model), apack_compile.new_cache(model)
    greedily = greedy(model, {"input_ids": ids}, 20, past_key_values=plain)
    logits = model(input_ids=ids, past_key_values=cache).logits
    cache.activate_past_recording()
    said = [int(logits[0, -1].argmax())]
    for count in (41, 3, 1, 33, 7, 2, 65, 5, 11, 4, 8, 40, 9, 6, 12, 35, 1, 2, 3):
        wrong = torch.randint(5, 90, (1, count), generator=torch.Generator().manual_seed(count))
        chunk = torch.cat([torch.tensor([said[-1:]]), wrong], 1)
        said.append(int(model(input_ids=chunk, past_key_values=cache).logits[0, 0].argmax()))
        cache.crop(-count)
    assert said == greedily[0, 71:].tolist()
    check_same_importance(cache, plain)
