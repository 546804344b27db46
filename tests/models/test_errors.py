"""Bad input: an error that names the argument, and model and cache as they were."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from vlms import build, prompt

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.generate.quantize import resolve

RANKS = ("vision_key", "vision_value", "text_key", "text_value")


@pytest.fixture(scope="module")
def llava():
    model, placeholders = build("llava")
    return model, prompt("llava", [[25, 9]], placeholders)


def untouched(model) -> bool:
    return not any(name in vars(model) for name in ("generate", "_apack_session")) and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1}, "ratio=1 must be a finite number > 1"),
        ({"ratio": float("nan")}, "ratio=nan must be"),
        ({"ratio": float("inf")}, "ratio=inf must be"),
        ({"ratio": "4"}, "ratio='4' must be"),
        ({"ratio": True}, "ratio=True must be"),
        ({"ratio": 400}, r"ratio=400 is out of reach: the largest for KV width 16 is 5\.3"),
        ({"preset": "lossles"}, "preset='lossles' is not one of lossless, attentionpack"),
        ({"preset": "lossless", "ratio": 4}, "exclude each other"),
        ({"compile": "fast"}, "compile='fast' is not one of auto"),
        ({"quantize": "int3"}, "quantize='int3' is not one of int8wo"),
        ({"quantize": 7}, "quantize=7 is neither"),
        ({"strict": 1}, "strict=1 must be"),
        ({"min_tokens": -1}, "min_tokens=-1 must be an integer >= 0, or None"),
        ({"min_tokens": 64.0}, r"min_tokens=64\.0 must be an integer >= 0, or None"),
        ({"min_tokens": True}, "min_tokens=True must be an integer >= 0, or None"),
        ({"config": {"ratio": 4}}, "config=.* must be an AttentionPackConfig"),
        (
            {"config": AttentionPackConfig(preset="attentionpack", ranks=dict.fromkeys(RANKS, [8] * 7))},
            "vision_key has 7 ranks, but 3 layers can be packed",
        ),
    ],
)
def test_a_bad_argument_is_named_and_the_model_left_alone(llava, arguments, message):
    model, _ = llava
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(model, **arguments)
    assert untouched(model)


def test_a_failing_second_call_keeps_the_first(llava):
    model, _ = llava
    apack_compile.optimize(model, preset="lossless", compile="none")
    with pytest.raises(ValueError, match="ratio"):
        apack_compile.optimize(model, ratio=0, min_tokens=0)
    assert apack_compile.report(model).setting == "preset='lossless'"
    apack_compile.restore(model)
    assert untouched(model)


def test_models_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match=r"Linear has no generate\(\)"):
        apack_compile.optimize(nn.Linear(2, 2), min_tokens=0)
    bert = BertModel(BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="BertModel"):
        apack_compile.optimize(bert, min_tokens=0)
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32))
    with pytest.raises(ValueError, match="no decoder-only KV cache"):
        apack_compile.optimize(t5, min_tokens=0)
    with torch.device("meta"):
        model, _ = build("llava")
    with pytest.raises(ValueError, match="meta device"):
        apack_compile.optimize(model, min_tokens=0)


def test_a_model_that_is_not_optimized_has_no_cache_and_no_report(llava):
    model, inputs = llava
    for call in (apack_compile.new_cache, apack_compile.report, lambda m: apack_compile.calibrate(m, inputs)):
        with pytest.raises(ValueError, match=r"call apack_compile\.optimize") as refused:
            call(model)
        assert ("GraphLog" in str(refused.value)) == (call is apack_compile.report)


def test_a_cache_of_another_model_is_refused_and_stays_empty(llava):
    model, inputs = llava
    other, _ = build("internvl")
    other = other.to(torch.bfloat16)
    apack_compile.optimize(other, preset="lossless", compile="none")
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(other)
    with pytest.raises(ValueError, match=r"cache: one for 3 layers, 2 KV heads x 8, torch\.bfloat16"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    assert not cache.is_filled
    apack_compile.restore(model)


def test_a_prompt_without_tokens_is_refused(llava):
    model, _ = llava
    apack_compile.optimize(model, preset="lossless", compile="none")
    with pytest.raises(ValueError, match="input_ids: the prompt has zero tokens"):
        model.generate(torch.empty(1, 0, dtype=torch.long))
    apack_compile.restore(model)


SMALL = {"vocab_size": 96, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TABLES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SMALL)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(max_position_embeddings=64, word_embed_proj_dim=32, ffn_dim=48, **OPT, **SMALL)
    ),
    "gpt_j": lambda: GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=2, n_head=2, n_positions=64, rotary_dim=8, **SMALL)),
}


@pytest.mark.parametrize("build_model", TABLES.values(), ids=TABLES)
def test_a_prompt_longer_than_a_table_of_positions_is_refused(build_model):
    model = apack_compile.optimize(build_model().eval(), preset="lossless", compile="none")
    ids = torch.randint(3, 90, (1, 65))
    with pytest.raises(ValueError, match="65 tokens; the model's positions end at 64"):
        model.generate(input_ids=ids, max_new_tokens=2)
    model.generate(input_ids=ids[:, 5:], max_new_tokens=3)


def test_padding_takes_no_position_of_a_table():
    model = TABLES["opt"]().eval()
    inputs = {"input_ids": torch.randint(3, 90, (1, 80)), "attention_mask": (torch.arange(80) >= 40)[None].long()}
    dense = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    apack_compile.optimize(model, preset="lossless", compile="none")
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), dense)


@pytest.mark.parametrize("rope", ("default", "dynamic", "linear"))
def test_rotary_positions_have_no_end(rope):
    torch.manual_seed(0)
    kinds = {"rope_type": rope, "rope_theta": 1e4, **({} if rope == "default" else {"factor": 4.0})}
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=kinds, initializer_range=0.2, **LLAMA, **SMALL)
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(3, 90, (1, 90))
    dense = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    for setting in ({"preset": "lossless"}, {"preset": "a-vl"}, {"ratio": 2}):
        apack_compile.optimize(model, compile="none", min_tokens=0, **setting)
        packed = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert packed.shape == dense.shape and apack_compile.report(model).bytes["tokens"] == 95
        assert torch.equal(packed, dense) or setting != {"preset": "lossless"}


def test_calibration_without_a_usable_token_is_refused(llava):
    model, _ = llava
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    with pytest.raises(ValueError, match="no usable token"):
        apack_compile.calibrate(model, [{"input_ids": torch.tensor([[5, 6, 7]])}])
    apack_compile.restore(model)


def test_nan_in_the_middle_of_a_model_leaves_the_cache_empty(llava):
    model, inputs = copy.deepcopy(llava)
    model.model.language_model.layers[1].self_attn.v_proj.weight.data[3] = float("nan")
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(model)
    with pytest.raises(ValueError, match="layer 1: value states hold NaN or Inf"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    assert not any(layer.is_initialized for layer in cache.layers)


def test_a_batch_size_that_changes_is_refused_and_the_cache_stays(llava):
    model, inputs = llava
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        held = int(cache.get_seq_length())
        with pytest.raises(ValueError, match="batch size is 2, but this cache holds 1"):
            model(input_ids=torch.full((2, 3), 5), past_key_values=cache)
    assert int(cache.get_seq_length()) == held
    apack_compile.restore(model)


def test_a_short_name_quantizes_the_decoder_only():
    pytest.importorskip("torchao", reason="torchao is an extra")
    model, placeholders = build("llava")
    inputs = prompt("llava", [[25, 9]], placeholders)
    vision = copy.deepcopy(model.model.vision_tower.state_dict())
    apack_compile.optimize(model, preset="lossless", quantize="int8wo", compile="none")
    assert apack_compile.report(model).quantized_layers == 3 * 7
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__ != "Parameter"
    assert type(model.lm_head.weight) is nn.Parameter
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, vision[name])
    model.generate(**inputs, max_new_tokens=3)
    with pytest.raises(ValueError, match="quantized already"):
        apack_compile.optimize(model, preset="lossless", quantize="int8wo")


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"pip install 'apack-compile\[quant\]'"):
        resolve("int8wo")


@pytest.mark.parametrize("block", (-1, 1.5, True, "32"))
def test_a_bad_block_of_keys_is_named(block):
    with pytest.raises(ValueError, match=f"key_block={block!r} must be an integer >= 0"):
        AttentionPackConfig(key_block=block, min_tokens=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 5}, "ranks=5 must give a positive integer"),
        ({"coarse": [["text"]]}, r"coarse=\[\['text'\]\] must hold"),
        ({"coarse": "text"}, "coarse='text' must hold"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionPackConfig(**options)


@pytest.mark.parametrize("tokens", (-1, 8.0, True, "8"))
def test_bad_new_tokens_of_a_cache_are_named(llava, tokens):
    model, _ = llava
    apack_compile.optimize(model, preset="lossless", compile="none")
    with pytest.raises(ValueError, match=f"max_new_tokens={tokens!r} must be an integer >= 0"):
        apack_compile.new_cache(model, tokens)
    apack_compile.restore(model)


@pytest.mark.parametrize("model", ("path/to/model", None, 7))
def test_what_is_no_model_is_named(model):
    for call in (
        apack_compile.optimize,
        apack_compile.restore,
        apack_compile.report,
        apack_compile.new_cache,
        lambda model: apack_compile.plan_for(model, 9),
        lambda model: apack_compile.calibrate(model, {"input_ids": torch.ones(1, 9).long()}),
    ):
        with pytest.raises(ValueError, match=f"^model: .*{type(model).__name__}"):
            call(model)


@pytest.mark.parametrize("groups", (0, True, 2.0))
def test_bad_head_groups_are_named(groups):
    with pytest.raises(ValueError, match=f"head_groups={groups!r} must be an integer >= 1"):
        AttentionPackConfig(head_groups=groups, min_tokens=0)


def test_head_groups_must_divide_the_heads(llava):
    model, _ = llava
    with pytest.raises(ValueError, match="head_groups=3 must divide the model's 2 KV heads"):
        apack_compile.optimize(model, AttentionPackConfig(ratio=2, head_groups=3, min_tokens=0))
    assert untouched(model)


def test_a_config_goes_to_json_and_back():
    config = AttentionPackConfig(
        preset="attentionpack", ranks=dict.fromkeys(AttentionPackConfig(min_tokens=0).ranks, 32), strict=True
    )
    assert AttentionPackConfig.from_json(config.to_json()) == config
    assert AttentionPackConfig(min_tokens=0).ratio == 4
    for text in ("{", "[]", '{"ratios": 4}'):
        with pytest.raises(ValueError):
            AttentionPackConfig.from_json(text)
    with pytest.raises(ValueError, match="ratio"):
        AttentionPackConfig.from_json('{"ratio": 0.5}')


def test_optimize_takes_a_config_and_a_copy_of_the_model_is_its_own(llava):
    model, inputs = llava
    apack_compile.optimize(model, AttentionPackConfig(preset="lossless", compile="none"))
    with pytest.raises(ValueError, match="either a config or the keyword"):
        apack_compile.optimize(model, AttentionPackConfig(min_tokens=0), ratio=4)
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    assert torch.equal(
        twin.generate(**inputs, max_new_tokens=4, do_sample=False),
        model.generate(**inputs, max_new_tokens=4, do_sample=False),
    )
    apack_compile.restore(model)
    assert untouched(model)
