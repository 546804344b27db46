"""What the general rules cannot know about single model types, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import prompts
from .outcome import BROKEN_UPSTREAM, NOT_APPLICABLE, TESTED_ELSEWHERE
from .prompts import Pixels


@dataclass(frozen=True)
class Case:
    """One model type.

    config: values by dotted path, put over the shrunk config (an ellipsis removes a value). pixels: the picture's inputs, by
    default those that the forward's arguments tell. placeholders: tokens of the picture in the prompt, by default as many as its
    features have. text_only: why the prompt has no picture. tower: replaces `vision_config`, where that needs a package.
    generate: further arguments of generate.
    elsewhere: why the contract cannot run, and the test that runs instead. attributes: set on the model, where a checkpoint's own
    file would. expected: the status, where it is not one of those that work.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    pixels: Pixels | None = None
    placeholders: int | None = None
    text_only: str | None = None
    tower: Mapping[str, Any] | None = None
    generate: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    expected: str | None = None


def mrope(*section: int) -> dict[str, Any]:
    """Rotary parameters of positions with several coordinates."""
    return {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}}


ROPE = {"rope_type": "default", "rope_theta": 1e4}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TIMM = "its vision tower needs the package timm; a CLIP tower stands in"
SOUND = "its tokens come with the sound it hears: it packs and compiles, shown by a test of its own (tests/models/test_windows.py)"
TINY_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "resolution": 32,
    "latent_channels": 16,
}
SHARED_KV = {
    "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
    "text_config.num_kv_shared_layers": 2,
    "text_config.per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
}
OMNI = {
    "vision_start_token_id": 421,
    "vision_end_token_id": 422,
    "audio_start_token_id": 423,
    "audio_end_token_id": 424,
}

CASES: dict[str, Case] = {
    "apertus1p5": Case(
        {
            "audio_config.codebook_dim": 64,
            "audio_config.codebook_size": 32,
            "vision_config.base_channels": 32,
            "vision_config.latent_channels": 32,
            "vision_config.codebook_size": 32,
            "image_token_offset": 430,
            "audio_token_offset": 462,
        },
        text_only="its pictures become text tokens before the model",
    ),
    "aria": Case({"projector_patch_to_query_dict": {16: 4}}),
    "chameleon": Case(
        {
            "vq_config": {**TINY_VQ, "num_embeddings": 10, "embed_dim": 16},
            "image_token_id": 420,
            "vocabulary_map": {"<image>": 420, **{f"IMGIMG{c}Z": 430 + i for i, c in enumerate("ABCDEFGHIJ")}},
        }
    ),
    "cohere_compass": Case({"text_config.rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}),
    "deepseek_vl_hybrid": Case({"high_res_vision_config.global_attn_indexes": [0, 1]}),
    "deepseek_ocr2": Case(
        {
            "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "text_config.num_experts_per_tok": 2,
            "text_config.n_group": 1,
            "text_config.topk_group": 1,
            "vision_config.sam_config.downsample_channels": [32, 64],
        }
    ),
    "diffusion_gemma": Case(
        {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 96},
        expected=NOT_APPLICABLE,
    ),
    "dots3_note": Case({"text_config.head_dim": 24}, expected=NOT_APPLICABLE),
    "emu3": Case(
        {"vocabulary_map": {"<image>": 420}, "image_token_id": 420, "vq_config.base_channels": 32},
        text_only="its pictures become text tokens before the model",
    ),
    "ernie4_5_vl_moe": Case(mrope(3, 3, 2)),
    "evolla": Case(text_only="it reads proteins", generate={"use_cache": True}),
    "fast_vlm": Case({"vision_config": CLIP}, text_only=TIMM),
    "fun_asr_nano": Case({"adaptor_config.intermediate_size": 16}),
    "fuyu": Case(placeholders=16),
    "gemma3n": Case(
        {"text_config.layer_types": SHARED_KV["text_config.layer_types"], "text_config.num_kv_shared_layers": 2},
        tower={**CLIP, "vocab_size": 512, "vocab_offset": 490, "rms_norm_eps": 1e-6},
        text_only=TIMM,
    ),
    "gemma4": Case(SHARED_KV, text_only="its default config has no vision tower"),
    "gemma4_unified": Case(text_only="its default config has no vision tower"),
    "git": Case(placeholders=0, expected=BROKEN_UPSTREAM),
    "glm46v": Case(mrope(2, 3, 3)),
    "glm4v": Case(mrope(2, 3, 3)),
    "glm4v_moe": Case(mrope(1, 1, 2)),
    "glm_ocr": Case(mrope(2, 3, 3)),
    "glmga": Case(mrope(2, 3, 3)),
    "granite4_vision": Case(
        {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "image_grid_pinpoints": [[32, 32]],
            "spatial_target_layers": [0, 1, 2, 3],
            "qformer_config.num_attention_heads": 4,
        },
        prompts.whole_and_tile,
        placeholders=10,
    ),
    "granite_docling": Case(pixels=prompts.masked_tiles_of_row),
    "hunyuan_vl": Case({"text_config.head_dim": 16, "vision_config.max_image_size": 64, **mrope(2, 2, 2, 2)}),
    "hy_v4_vl": Case(mrope(2, 1, 1), expected=NOT_APPLICABLE),
    "idefics": Case(placeholders=0),
    "inkling2": Case(pixels=prompts.merged_patches),
    "inkling2_loop": Case(pixels=prompts.merged_patches, expected=NOT_APPLICABLE),
    "inkling_mm_model": Case({"vision_config.n_layers": 6}, prompts.patches_in_time),
    "instructblipvideo": Case({"video_token_index": 420}, pixels=prompts.frames_with_instruction, placeholders=8),
    "kimi_k25": Case({"text_config.head_dim": 8}, prompts.square_patches_of_grid, expected=NOT_APPLICABLE),
    "blip": Case(placeholders=0, expected=NOT_APPLICABLE),
    "blip-2": Case({"image_token_index": 420}),
    "instructblip": Case({"image_token_index": 420}),
    "kosmos-2": Case({"latent_query_num": 4}, placeholders=4, expected=BROKEN_UPSTREAM),
    "lighton_ocr": Case(pixels=prompts.sized_picture),
    # transformers 5.24: its outputs have no image_outputs, which its own forward reads
    "llama4": Case({"vision_config.intermediate_size": 256}, placeholders=4, expected=BROKEN_UPSTREAM),
    "llava_next": Case({"image_grid_pinpoints": [[32, 32]]}, prompts.whole_and_tile),
    "llava_next_video": Case({"image_grid_pinpoints": [[32, 32]]}, prompts.whole_and_tile),
    "llava_onevision": Case({"image_grid_pinpoints": [[32, 32]]}, prompts.whole_and_tile),
    "minicpm_ocr": Case({"image_token_id": 420}),
    "minicpmv4_6": Case({"image_token_id": 420}),
    "minicpmv4_7": Case({"image_token_id": 420}),
    "muse_glimmer": Case({"out_hidden_size": 256}),
    "muse_spark": Case({"out_hidden_size": 256}),
    "mistral3": Case(pixels=prompts.sized_picture),
    "mistral4": Case(text_only="it is the language model alone", expected=NOT_APPLICABLE),
    "mistral_large4": Case({"text_config.head_dim": 8}, prompts.sized_picture, expected=NOT_APPLICABLE),
    "mllama": Case(
        {
            "text_config.cross_attention_layers": [1],
            "vision_config.intermediate_layers_indices": [0, 1],
            "vision_config.vision_output_dim": 192,
        },
        placeholders=0,
    ),
    "molmo2": Case(
        {"adapter_config.vision_feature_layer": [-1, 0]}, text_only="its pooling indices come from its processor"
    ),
    "nemotron_h_omni": Case(text_only="its default config has no image token"),
    "paddleocr_vl": Case(mrope(2, 3, 3), prompts.square_patches_of_grid),
    "perception_lm": Case(tower={**CLIP, "model_args": {"embed_dim": 64}}, text_only=TIMM),
    "phi4_multimodal": Case(text_only="its picture tokens come from its processor"),
    "qwen2_5_omni_thinker": Case({**OMNI, **mrope(2, 3, 3)}),
    "qwen2_5_omni": Case(
        {
            "enable_audio_output": False,
            **{f"thinker_config.{name}": value for name, value in {**OMNI, **mrope(2, 3, 3)}.items()},
        },
        text_only="a prompt of its thinker",
        attributes={"speaker_map": {"Chelsie": {}}},
        generate={"generation_mode": "text"},
        expected=BROKEN_UPSTREAM,
    ),
    "qwen3_omni_moe": Case(
        {
            "enable_audio_output": False,
            "talker_config.text_config.shared_expert_intermediate_size": 64,
            **{f"thinker_config.{name}": value for name, value in OMNI.items()},
        },
        text_only="a prompt of its thinker",
    ),
    "janus": Case({"vq_config.base_channels": 32}),
    "vibevoice_asr": Case({f"{name}_tokenizer_encoder_config.num_filters": 4 for name in ("acoustic", "semantic")}),
    "kyutai_speech_to_text": Case({"codec_config.upsample_groups": 64}, elsewhere=SOUND, expected=TESTED_ELSEWHERE),
    "qwen2_5_vl": Case(mrope(2, 3, 3)),
    "qwen2_vl": Case(mrope(2, 3, 3)),
    "qwen3_omni_moe_thinker": Case(OMNI),
    "qwen4_exp": Case(
        {
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 16,
            "text_config.indexer_budget": 16,
            "text_config.indexer_compress_ratio": 4,
        },
    ),
    "step3p7": Case({"text_config.sliding_window": 24}),
    "unlimited_ocr": Case({"vision_config.sam_config.downsample_channels": [32, 64]}, expected=NOT_APPLICABLE),
    "vipllava": Case({"vision_feature_layers": [-1, -1, -1, -1, -1]}),
    "florence2": Case(expected=NOT_APPLICABLE),
    "glm5_next": Case(expected=NOT_APPLICABLE),
    "pi0": Case(expected=NOT_APPLICABLE),
    "pix2struct": Case(expected=NOT_APPLICABLE),
    "pp_formulanet": Case(expected=NOT_APPLICABLE),
    "t5gemma2": Case(expected=NOT_APPLICABLE),
    "udop": Case(expected=NOT_APPLICABLE),
    "vision-encoder-decoder": Case(expected=NOT_APPLICABLE),
    "voxtral_realtime": Case(elsewhere=SOUND, expected=TESTED_ELSEWHERE),
}
