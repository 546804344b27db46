"""A model that does not use, or stops using, the cache it is given: the dense tokens, and a report that says so."""

import pytest
import torch
from llava_and_draft import calibrated, llava
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import apack_compile
from apack_compile.errors import StrictError
from apack_compile.models.cache_argument import cache_name

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


def phi3():
    """Its rotary frequencies change after 128 tokens: all tokens before are read anew."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "rope_theta": 1e4}
    limits = {"max_position_embeddings": 1024, "original_max_position_embeddings": 128}
    rope["original_max_position_embeddings"] = 128
    return Phi3ForCausalLM(Phi3Config(rope_parameters=rope, sliding_window=None, **limits, **SMALL)).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


class Stops(LlamaForCausalLM):
    """Goes on without its cache after 70 tokens."""

    def forward(self, *args, **kwargs):
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            return super().forward(*args, **kwargs)
        self.steps = getattr(self, "steps", 0) + 1
        dropped = dict.fromkeys((cache_name(self), "attention_mask")) if self.steps > 9 else {}
        return super().forward(*args, **{**kwargs, **dropped})


def prompt(tokens):
    return torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(1))


def said_by(model, tokens, new=60, **settings):
    return model.generate(input_ids=prompt(tokens), max_new_tokens=new, do_sample=False, **settings)


@pytest.mark.parametrize("compile", ("none", "eager"))
@pytest.mark.parametrize("tokens", (240, 100))
@pytest.mark.parametrize("setting", ({"preset": "lossless"}, {"ratio": 4}), ids=str)
def test_a_model_that_reads_all_its_tokens_anew_packs_them_anew(setting, tokens, compile):
    dense = said_by(phi3(), tokens)
    if not torch.equal(dense, said_by(phi3(), tokens, use_cache=False)):
        pytest.skip("transformers' own cache forgets all tokens but one")
    model = apack_compile.optimize(phi3(), compile=compile, strict=True, min_tokens=0, **setting)
    cache = apack_compile.new_cache(model)
    for given in ({}, {"past_key_values": cache}):
        packed = said_by(model, tokens, **given)
        report = apack_compile.report(model)
        assert report.bytes["tokens"] == tokens + 59
        assert ("after 128 tokens the model asked to read all of them anew" in report.notes) == (tokens == 100)
        assert torch.equal(packed, dense) or "ratio" in setting
    assert int(cache.get_seq_length()) == tokens + 59


def test_gradient_checkpointing_in_train_mode_generates_what_the_dense_model_does():
    def trained(model):
        model.train().gradient_checkpointing_enable()
        return model

    dense = said_by(trained(llama()), 90, 8)
    model = apack_compile.optimize(trained(llama()), preset="lossless", compile="none")
    assert torch.equal(said_by(model, 90, 8), dense)
    report = apack_compile.report(model)
    assert report.bytes is not None or any("gradient checkpointing in train mode" in note for note in report.notes)


def test_a_training_pass_that_takes_the_cache_away_is_noted_or_raises():
    model = apack_compile.optimize(llama().train(), preset="lossless", compile="none")
    model.gradient_checkpointing_enable()
    cache = apack_compile.new_cache(model)
    model(input_ids=prompt(40), past_key_values=cache, labels=prompt(40)).loss.backward()
    text = r"LlamaForCausalLM.forward stored nothing in the packed cache that it was given \(gradient checkpointing in train"
    assert len(cache.notes) == 1 and not cache.is_filled
    strict = apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    with pytest.raises(StrictError, match=text):
        strict(input_ids=prompt(40), past_key_values=apack_compile.new_cache(strict))


def test_a_cache_that_was_dropped_half_way_is_noted_or_raises():
    def stops():
        torch.manual_seed(0)
        return Stops(LlamaConfig(**SMALL)).eval()

    dense = said_by(stops(), 60, 20)
    model = apack_compile.optimize(stops(), preset="lossless", compile="none")
    assert torch.equal(said_by(model, 60, 20), dense)
    note = "the cache holds 69 of 79 tokens: the model went on without it"
    assert note in apack_compile.report(model).notes
    strict = apack_compile.optimize(stops(), preset="lossless", compile="none", strict=True)
    with pytest.raises(StrictError, match=r"Stops\.forward stored nothing in the packed cache that it was given"):
        said_by(strict, 60, 20)


def test_the_report_counts_passes_without_a_packed_cache():
    model, ids = calibrated(llava(), ratio=4), prompt(60)
    said_by(model, 60, 4)

    def counted():
        return [note for note in apack_compile.report(model).notes if "had none" in note]

    assert counted() == []
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=ids, labels=ids)
    assert len(counted()) == 1 and counted()[0].startswith("3 forward passes since the last one with a packed cache")
    apack_compile.calibrate(model, {"input_ids": prompt(300)})
    said_by(model, 60, 4, use_cache=False)
    assert counted()[0].startswith("3 forward passes")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=apack_compile.new_cache(model))
    assert counted() == []
