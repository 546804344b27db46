"""Small random VLMs whose positions have three coordinates, and prompts with pictures that are wider than high."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, IMAGE_START, IMAGE_END, VIDEO, PAD = 90, 91, 92, 93, 0
# Patches of a picture: one in time, four high, twelve wide; 2 x 2 of them are one token.
GRID = [1, 4, 12]
PLACEHOLDERS = 12
TEXT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}


def text(section: list[int], **others: Any) -> dict[str, Any]:
    """Settings of a language model whose pairs rotate by coordinates in these shares."""
    return {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 1e4, **others}}


def qwen2_vl() -> Any:
    """Sections side by side; keys have a bias."""
    vision = {**VISION, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    sizes = text([2, 3, 3])
    del sizes["head_dim"]
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config={**sizes, "hidden_size": 64}, vision_config={**vision, "hidden_size": 64}, **TOKENS)
    )


def qwen2_5_vl(heads: int = 4, kv_heads: int = 2, spread: float = 0.2) -> Any:
    """Sections side by side, a window in the vision tower."""
    width = heads * TEXT["head_dim"]
    vision = {**VISION, "out_hidden_size": width, "window_size": 32, "fullatt_block_indexes": [1]}
    sizes = text([1, 2, 5]) | {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes["initializer_range"] = spread
    del sizes["head_dim"]
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=sizes, vision_config=vision, **TOKENS))


def qwen3_vl() -> Any:
    """Sections interleaved, keys normalised before they rotate."""
    vision = {**VISION, "out_hidden_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text([4, 2, 2], mrope_interleaved=True), vision_config=vision, **TOKENS)
    )


MODELS: dict[str, Callable[..., Any]] = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
# Which of time, height and width each of the 8 pairs of a head rotates by.
COORDINATES = {
    "qwen2_vl": [0, 0, 1, 1, 1, 2, 2, 2],
    "qwen2_5_vl": [0, 1, 1, 2, 2, 2, 2, 2],
    "qwen3_vl": [0, 1, 2, 0, 1, 2, 0, 0],
}


def build(name: str, **sizes: float) -> Any:
    """A model with fixed random weights."""
    torch.manual_seed(0)
    model = MODELS[name](**sizes)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("k_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def prompt(rows: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs: each row lists text lengths, a picture stands between neighbours; shorter rows are padded left."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for lengths in rows:
        ids: list[int] = []
        for i, length in enumerate(lengths):
            ids += [IMAGE_START, *[IMAGE] * PLACEHOLDERS, IMAGE_END] if i else []
            ids += torch.randint(2, 80, (length,), generator=generator).tolist()
        sequences.append(ids)
    longest = max(map(len, sequences))
    input_ids = torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    pictures = sum(len(lengths) - 1 for lengths in rows)
    if pictures:
        inputs["pixel_values"] = torch.randn(pictures * 48, 3 * 2 * 8 * 8, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([GRID] * pictures)
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).long()
    return inputs
