"""A small config of any model type: walk its default config and replace sizes, keeping what must agree in agreement.

Every width becomes HIDDEN, so that what one part hands to the next fits without knowing the parts. Layers are chosen so that
every kind of layer occurs; lists with an entry per layer are cut to the chosen layers.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import CONFIG_MAPPING

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
TEXT_LAYERS, TOWER_LAYERS = 4, 2
VOCABULARY = 512
# Special tokens are the last ids of the vocabulary; prompts use those below.
FIRST_SPECIAL = 400
IMAGE_SIZE, PATCH = 32, 8
PATCHES = (IMAGE_SIZE // PATCH) ** 2

LAYER_COUNTS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "layers", "n_layers")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")
# Prompts of the contract's first part are longer.
SHORT_WINDOW = 24
# The first row with a pattern that a key matches gives its value.
SIZES: tuple[tuple[int, str], ...] = (
    (2048, "max_position_embeddings max_source_positions"),
    (VOCABULARY, "(.*_)?vocab_size(_per_layer_input)?"),
    (
        HEAD_DIM,
        "(swa_|linear_|linear_key_|linear_value_|mamba_|resampler_|index_)?head_dim qk_nope_head_dim v_head_dim d_kv dim_head",
    ),
    (HEAD_DIM // 2, "qk_rope_head_dim rotary_dim"),
    (HEAD_DIM + HEAD_DIM // 2, "qk_head_dim"),
    (16, "kv_lora_rank q_lora_rank index_topk"),
    (KV_HEADS, "(swa_)?num_key_value_heads linear_num_key_heads n_groups"),
    (HEADS, "(swa_|encoder_|decoder_|linear_|conf_|mamba_)?(num_)?(attention_)?heads (index_)?n_heads"),
    (HEADS, "linear_num_value_heads num_sliding_attention_heads"),
    (INTERMEDIATE, ".*intermediate_size.* .*ffn_dim d_ff mlp_dim projection_hidden_dim merged_hidden_size"),
    (
        HIDDEN,
        "(.*_)?hidden_size .*hidden_dim d_model embed_dim ple_embed_dim word_embed_proj_dim decoder_dim .*embedding_size",
    ),
    (
        HIDDEN,
        "hidden_size_per_layer_input image_text_hidden_size projection_dim output_dim output_channels vision_output_dim",
    ),
    (HIDDEN, "adapter_(in|out)_dim adapter_input_size projector_(in|out)put_dim"),
    (4, "n_routed_experts num_local_experts num_experts moe_num_experts num_query_tokens"),
    (2, "num_experts_per_tok moe_k top_k_experts n_shared_experts moe_num_shared_experts"),
    (1, "n_group topk_group"),
    (SHORT_WINDOW, " ".join(WINDOWS)),
    (IMAGE_SIZE, "image_size crop_size"),
    (PATCH, "patch_size"),
    (
        PATCHES,
        "image_seq_length num_image_tokens num_patches mm_tokens_per_image vision_soft_tokens_per_image num_position_embeddings",
    ),
)
PATTERNS = tuple((re.compile("|".join(names.split())), size) for size, names in SIZES)
LANGUAGE_MODEL = re.compile("text|decoder|thinker|vlm")
SPECIAL = re.compile(r".*_(token_id|token_index|start_id|end_id|patch_id)|newline_id")


def small_config(model_type: str, overrides: Mapping[str, Any], window: int = SHORT_WINDOW) -> Any:
    """The small config of a type; `overrides` are put over what the rules give, by dotted path. window: of layers that have one."""
    config_class = CONFIG_MAPPING[model_type]
    values = shrunk(config_class().to_dict(), SpecialTokens())
    for path, value in overrides.items():
        put(values, path.split("."), deepcopy(value))
    return config_class.from_dict(with_window(values, window))


def with_window(values: Any, window: int) -> Any:
    """A config's values with another window in place of the short one."""
    if not isinstance(values, Mapping):
        return values
    return {
        key: window if key in WINDOWS and value == SHORT_WINDOW else with_window(value, window)
        for key, value in values.items()
    }


class SpecialTokens:
    """New ids for the special tokens of a config, the same for the same old one."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def __getitem__(self, token: int) -> int:
        return self.known.setdefault(token, FIRST_SPECIAL + len(self.known))


def put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value at a path of keys; an ellipsis removes it."""
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    if value is ...:
        values.pop(path[-1], None)
    else:
        values[path[-1]] = value


def shrunk(values: Mapping[str, Any], special: SpecialTokens, tower: bool = False) -> dict[str, Any]:
    """A config's values with small sizes; `tower`: of a part that is not the language model."""
    layers = next((name for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    kept = chosen_layers(values, values[layers], TOWER_LAYERS if tower else TEXT_LAYERS) if layers else []
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in LAYER_COUNTS and isinstance(value, int):
            out[key] = len(kept)
        elif key == "per_layer_config":
            of_layer = {int(layer): shrunk(part, special) for layer, part in value.items()}
            out[key] = {str(new): of_layer[layer] for new, layer in enumerate(kept) if layer in of_layer}
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            out[key] = small_rope(value)
        elif isinstance(value, Mapping) and (key.endswith("config") or key in ("encoder", "decoder")):
            out[key] = shrunk(value, special, tower or not LANGUAGE_MODEL.match(key))
        elif isinstance(value, list) and layers and len(value) == values[layers]:
            out[key] = [small(key, value[i], special) for i in kept]
        else:
            out[key] = small(key, value, special)
    if out.get("kv_lora_rank") and out.get("num_key_value_heads"):
        out["num_key_value_heads"] = out["num_attention_heads"]
    return out


def chosen_layers(values: Mapping[str, Any], count: int, wanted: int) -> list[int]:
    """Layers to keep, in order: the first of each kind, then the first ones."""
    kinds = list(
        zip(*(v for k, v in values.items() if k.endswith("layer_types") and v and len(v) == count), strict=False)
    )
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    rest = [i for i in range(count) if i not in first]
    return sorted(first + rest[: max(wanted - len(first), 0)])


def small_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of HEAD_DIM."""
    out = {k: small_rope(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    if isinstance(out.get("mrope_section"), list):
        out["mrope_section"] = [3, 3, 2]
    return out


def small(key: str, value: Any, special: SpecialTokens) -> Any:
    """A small value for a key, or the value."""
    if isinstance(value, int) and not isinstance(value, bool) and SPECIAL.fullmatch(key) and value >= 0:
        # pad, bos and eos stay where prompts do not go
        return special[value]
    if isinstance(value, list) and SPECIAL.fullmatch(key):
        return [special[token] for token in value]
    found = next((size for pattern, size in PATTERNS if pattern.fullmatch(key)), None)
    if found is None or isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, list):
        return [min(found, v) if isinstance(v, int) else v for v in value]
    return min(found, value) if isinstance(value, int) and value > 0 else value
