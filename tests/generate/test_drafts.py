"""Assisted and prompt-lookup decoding: what was drafted and not taken is cropped, whatever it was."""

import pytest
import torch
from small import calibrated, draft, greedy, llava, picture
from vlms import IMAGE, build

import apack_compile

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


@pytest.mark.parametrize("setting", [{"ratio": 4}, {"preset": "attentionpack"}, {"preset": "a-vl"}], ids=str)
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
