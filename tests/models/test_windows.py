"""Models whose layers see only the newest tokens: packed, and with lossless tokens the dense model's across the window's edge."""

import pytest
import torch
from matrix.building import build as build_type
from matrix.building import class_names
from preset_rows import TIERED_PRESETS
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.generate.generation import why_no_masks

WINDOW = 20
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=MIXED)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, sliding_window=WINDOW, layer_types=MIXED)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **{**SIZES, "intermediate_size_mlp": 80, "num_local_experts": 2},
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
            no_rope_layers=[1, 0, 1],
        )
    ),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def prompt(*lengths, seed=0):
    """Rows of so many tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(2, 96, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, tokens=2 * WINDOW, **kwargs):
    """Sampled with a seed: greedy tokens of a random model soon repeat themselves."""
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=tokens, **{"do_sample": True, **kwargs})


def statuses(model):
    return {line.status for line in apack_compile.report(model).layers}


@pytest.mark.parametrize("compile", ["none", "eager"])
@pytest.mark.parametrize("lengths", [(9,), (3 * WINDOW, WINDOW - 3)], ids=["shorter", "longer-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_dense_ones_across_the_edge_of_the_window(name, lengths, compile):
    model, inputs = build(name), prompt(*lengths)
    dense = generate(model, inputs)
    assert dense[:, -WINDOW:].unique().numel() > 5
    apack_compile.optimize(model, preset="lossless", compile=compile, strict=True)
    assert torch.equal(generate(model, inputs), dense)
    rewritten = compile == "eager" and why_no_masks(model) is None
    assert statuses(model) == {"rewritten" if rewritten else "packed"}
    assert len(apack_compile.report(model).graphs) == rewritten


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3, "do_sample": False},
        {"prompt_lookup_num_tokens": 5},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 40},
    ],
)
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_every_way_to_generate_gives_the_dense_tokens(name, kwargs):
    model, inputs = build(name), prompt(70)
    # a chunked prompt and drafts repeat themselves, so that drafts are taken
    inputs["input_ids"][:, 35:] = inputs["input_ids"][:, :35]
    dense = generate(model, inputs, **kwargs)
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    assert torch.equal(generate(model, inputs, **kwargs), dense)


@pytest.mark.parametrize("compile", ["none", "eager"])
def test_an_assistant_with_windows_drafts_and_is_cropped(compile):
    model, assistant, inputs = build("gemma3"), build("gemma3"), prompt(50)
    try:
        dense = generate(model, inputs, assistant_model=assistant)
    except RuntimeError as error:
        pytest.skip(f"transformers' own cache fails as well: {error}")
    apack_compile.optimize(model, preset="lossless", compile=compile)
    apack_compile.optimize(assistant, preset="lossless", compile=compile)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), dense)


@pytest.mark.parametrize("turn", [5, 40])
@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_goes_on_over_one_cache(name, turn):
    model, inputs = build(name), prompt(15)

    def talk(cache):
        ids = inputs["input_ids"]
        for i in range(3):
            ids = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 25, past_key_values=cache)
            ids = torch.cat([ids, prompt(turn, seed=i)["input_ids"]], 1)
        return ids

    dense = talk(DynamicCache(config=model.config))
    apack_compile.optimize(model, preset="lossless", compile="none", strict=True)
    assert torch.equal(talk(apack_compile.new_cache(model)), dense)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_of_any_spelling_sees_the_window_alone(implementation):
    model, inputs = build("mistral"), prompt(50, 30)
    model.set_attn_implementation(implementation)
    dense = generate(model, inputs)
    for compile in ("none", "eager"):
        apack_compile.optimize(model, preset="lossless", compile=compile, strict=True)
        assert torch.equal(generate(model, inputs), dense)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_and_eager_decode_agree_for_a_lossy_plan(name):
    model, inputs = build(name), prompt(60, 44)
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt(400, seed=5))
    eager = generate(model, inputs)
    apack_compile.optimize(model, ratio=3, compile="eager", min_tokens=0)
    assert torch.equal(generate(model, inputs), eager)
    assert statuses(model) == {"rewritten" if why_no_masks(model) is None else "packed"}


def test_keys_rotate_by_the_frequencies_of_their_layers():
    model = build("gemma3")
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt(200))
    keys = apack_compile.report(model).keys
    assert (
        "full attention: rotated back to the start of their 64 slots, by model.rotary_emb.full_attention_inv_freq"
        in keys
    )
    assert (
        f"window of {WINDOW}: rotated back to the start of their 16 slots, by model.rotary_emb.sliding_attention_inv_freq"
        in keys
    )
    model = build("cohere2")
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt(200))
    keys = apack_compile.report(model).keys
    assert "full attention: stored as they are: they do not rotate" in keys and f"window of {WINDOW}: rotated" in keys


def test_a_window_is_planned_for_its_own_tokens():
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(**{**SIZES, "head_dim": 16}, sliding_window=512, layer_types=MIXED)
    ).eval()
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt(900, seed=1))
    cache = apack_compile.new_cache(model, 30)
    generate(model, prompt(1500), 30, past_key_values=cache)
    full, window = cache.groups
    assert window.index.plan is not full.index.plan and not set(window.index.plan.layers) & set(full.index.plan.layers)
    held = cache.report()
    width = 2 * 2 * 16 * 2
    assert held["dense_bytes"] == width * (1529 + 2 * 512)
    assert 3.8 < held["ratio"] < 4.6


def sound(model):
    """Inputs of a model whose tokens come with the sound it hears, about 60 of them."""
    generator = torch.Generator().manual_seed(0)
    if model.config.model_type == "kyutai_speech_to_text":
        return {"input_values": torch.randn(1, 1, model.config.codec_config.frame_size * 60, generator=generator)}
    ids = torch.randint(5, 380, (1, 6), generator=generator)
    features = torch.randn(1, 128, model.config.audio_length_per_tok * 60, generator=generator)
    return {"input_ids": ids, "input_features": features, "num_delay_tokens": 6}


@pytest.mark.parametrize("name", ["kyutai_speech_to_text", "voxtral_realtime"])
def test_models_whose_tokens_come_with_sound_give_the_dense_tokens(name):
    if name not in class_names():
        pytest.skip(f"this transformers has no {name}")
    model = build_type(name)
    inputs = sound(model)
    dense = generate(model, inputs, 40, do_sample=False)
    for compile in ("none", "eager"):
        apack_compile.optimize(model, preset="lossless", compile=compile, strict=True)
        assert torch.equal(generate(model, inputs, 40, do_sample=False), dense)
        assert statuses(model) == {"rewritten" if compile == "eager" else "packed"}


@pytest.mark.parametrize("compile", ["none", "eager"])
def test_sinks_are_attended_to_over_decoded_states(compile):
    sizes = {**SIZES, "num_hidden_layers": 4, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(**sizes, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
    ).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    inputs = prompt(50)
    dense = generate(model, inputs)
    apack_compile.optimize(model, preset="lossless", compile=compile)
    assert torch.equal(generate(model, inputs), dense)
    lines = apack_compile.report(model).layers
    if compile == "none":
        assert {line.status for line in lines} == {"packed"}
    else:
        assert {line.status for line in lines} == {"skipped"} and all("sink" in line.reason for line in lines)


@pytest.mark.parametrize("setting", TIERED_PRESETS, ids=str)
def test_published_presets_keep_every_token_of_a_window(setting):
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=60, layer_types=MIXED)).eval()
    # a window of 60 tokens is worth packing at a small rank
    ranks = dict.fromkeys(AttentionPackConfig(min_tokens=0).ranks, 1)
    apack_compile.optimize(model, AttentionPackConfig(**setting, ranks=ranks, compile="none"))
    cache = apack_compile.new_cache(model)
    generate(model, prompt(90), past_key_values=cache)
    full, window = cache.groups
    assert full.index.plan.tiers is not None and window.index.plan.tiers is None
    assert statuses(model) == {"packed"}


def test_chunks_decode_eagerly_only_where_transformers_own_static_cache_has_no_masks_for_them():
    model = build("llama4")
    try:
        generate(model, prompt(9), tokens=3, cache_implementation="static", disable_compile=True)
        fails = False
    except TypeError:
        fails = True
    assert (why_no_masks(model) is not None) == fails
    assert why_no_masks(build("gemma3")) is None
