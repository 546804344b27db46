"""Which layers of a model are packed, and the reasons of those that are not."""

import copy

import pytest
import torch
from matrix.building import build, class_names
from matrix.prompts import one_picture, prompt_for
from transformers import CONFIG_MAPPING, PretrainedConfig, cache_utils
from vlms import build as build_vlm
from vlms import prompt

import apack_compile
from apack_compile.generate.reporting import ONE_BY_ONE
from apack_compile.models.modality import vision_of


def small(model_type):
    if model_type not in class_names():
        pytest.skip(f"this transformers has no {model_type}")
    return build(model_type)


def kinds(model):
    apack_compile.optimize(model, preset="lossless", compile="none")
    return [(line.kind, line.status, line.reason) for line in apack_compile.report(model).layers]


def test_cross_attention_layers_keep_what_they_read_from_pictures():
    kept = "cross_attention: written once, from the pictures; transformers' DynamicLayer is kept"
    packed = ("full_attention", "packed", "decode is not compiled")
    assert kinds(small("mllama")) == [packed, ("cross_attention", "dense", kept), packed, packed]


def test_layers_that_read_another_layer_s_keys_hold_none():
    reasons = [reason for _, _, reason in kinds(small("gemma4"))][2:]
    shared = [
        f"{kind}: holds nothing of its own, no keys and values" for kind in ("sliding_attention", "full_attention")
    ]
    # older transformers have no cache entry for them at all
    assert reasons == (shared if hasattr(cache_utils, "DummyLayer") else [])


def test_heads_are_those_of_full_attention_where_layers_differ():
    model = small("gemma4")
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    assert apack_compile.new_cache(model).signature[1:3] == (2, 32)
    with pytest.raises(ValueError, match="largest for KV width 64"):
        apack_compile.optimize(model, ratio=400, min_tokens=0)


@pytest.mark.parametrize("model_type", ["kimi_k25", "dots3_note", "mistral_large4"])
def test_latents_are_left_alone(model_type):
    with pytest.raises(ValueError, match=r"can be packed \(latent_attention: what is cached is latent already"):
        apack_compile.optimize(small(model_type), min_tokens=0)


def test_every_reason_why_no_layer_can_be_packed_is_named():
    with pytest.raises(ValueError, match=r"linear_attention: holds a state of one size .*; latent_attention: what is"):
        apack_compile.optimize(small("glm5_next"), min_tokens=0)


def test_layers_without_keys_of_their_own_are_no_dense_ones():
    statuses = [status for _, status, _ in kinds(small("qwen3_5"))]
    assert statuses == ["no keys"] * 3 + ["packed"]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("blip", "BlipTextLMHeadModel keeps what it attends to across in the layers of its own tokens"),
        ("diffusion_gemma", "has a generate\\(\\) of its own"),
        ("pi0", "has no generate\\(\\)"),
        ("florence2", "an encoder reads pictures and prompt"),
        ("inkling2_loop", "reads some layers 3 times and adds layers to its cache"),
    ],
)
def test_models_that_generate_in_another_way_are_refused(model_type, message):
    if model_type == "diffusion_gemma" and CONFIG_MAPPING[model_type]().vision_config is None:
        pytest.skip("its default config in this transformers builds no model")
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(small(model_type), min_tokens=0)


def test_a_language_model_inside_that_generates_is_calibrated_and_packs():
    model = small("blip-2")
    inputs = prompt_for(model, one_picture, None, 120)
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.generate(**inputs, max_new_tokens=3)
        report = apack_compile.report(each)
        assert report.calibrated_on == "the first request" and report.bytes["tokens"] == 124 + 2
    apack_compile.restore(model)
    assert not model.language_model._forward_pre_hooks and twin.language_model._forward_pre_hooks


def test_linear_layers_and_sliding_ones_compile():
    for model_type in ("qwen3_5", "gemma4"):
        model = small(model_type)
        apack_compile.optimize(model, preset="lossless")
        assert not any("decode runs eagerly" in note for note in apack_compile.report(model).notes)


def test_what_a_packed_layer_shows_as_keys_has_no_numbers():
    model, placeholders = build_vlm("llava")
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(**prompt("llava", [[9]], placeholders), past_key_values=cache)
    assert cache.layers[0].keys.is_meta and cache.layers[0].keys.numel() == 0
    with pytest.raises(RuntimeError, match="not on the expected device meta"):
        torch.cat([cache.layers[0].keys, torch.ones(1, 2, 1, 8)], 2).sum().item()


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"use_cache": False}, "use_cache=False"), ({"cache_implementation": "static"}, "cache_implementation='static'")],
    ids=str,
)
def test_a_generate_without_a_packed_cache_is_noted(settings, why):
    model, placeholders = build_vlm("llava")
    inputs = prompt("llava", [[9]], placeholders)
    apack_compile.optimize(model, preset="lossless", compile="none")
    model.generate(**inputs, **settings, max_new_tokens=2)
    note = f"the last generate used no packed cache: {why}"
    assert note in apack_compile.report(model).notes
    model.generate(**inputs, max_new_tokens=2)
    assert note not in apack_compile.report(model).notes


def test_sites_of_graphs_that_name_no_layer_are_reported():
    model, placeholders = build_vlm("llava")
    apack_compile.optimize(model, preset="lossless", compile="eager")
    compile_config = model._apack_session.decode.config
    for layer in model.model.language_model.layers:
        layer.compile(backend=compile_config.backend)
    model.generate(**prompt("llava", [[9]], placeholders), max_new_tokens=3, disable_compile=True)
    lines = apack_compile.report(model).layers
    assert {line.reason for line in lines} == {ONE_BY_ONE} and {line.status for line in lines} == {"packed"}


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index", "image_patch_id", "video_token_index"])
def test_a_picture_s_token_is_known_by_the_names_that_configs_use(name):
    config = PretrainedConfig(**{name: 9})
    assert vision_of(config, {"input_ids": torch.tensor([[1, 9, 9, 2]])}).tolist() == [[False, True, True, False]]
