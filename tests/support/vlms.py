"""Small random VLMs of real architectures, and prompts with their image placeholders."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE, IMAGE_START, IMAGE_END, PAD = 90, 91, 92, 0
VOCABULARY = 96
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


def llava() -> tuple[Any, int]:
    """LLaVA over Llama; 4 placeholders an image."""
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), 4


def internvl() -> tuple[Any, int]:
    """InternVL over Qwen2; 4 placeholders an image."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        text_config=Qwen2Config(**TEXT).to_dict(),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return InternVLForConditionalGeneration(config), 4


def gemma3() -> tuple[Any, int]:
    """Gemma3, sliding and full layers; 4 placeholders an image."""
    config = Gemma3Config(
        text_config={
            **TEXT,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )
    return Gemma3ForConditionalGeneration(config), 4


def smolvlm() -> tuple[Any, int]:
    """SmolVLM over Llama; 4 placeholders an image."""
    config = SmolVLMConfig(
        text_config=LlamaConfig(**TEXT).to_dict() | {"model_type": "llama"},
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=IMAGE,
    )
    return SmolVLMForConditionalGeneration(config), 4


def qwen2_5_vl() -> tuple[Any, int]:
    """Qwen2.5-VL with multi-section RoPE; 4 placeholders an image."""
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 48,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=93,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )
    return Qwen2_5_VLForConditionalGeneration(config), 4


MODELS: dict[str, Callable[[], tuple[Any, int]]] = {
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "smolvlm": smolvlm,
}


def build(name: str) -> tuple[Any, int]:
    """A model with fixed random weights, and its placeholders per image."""
    torch.manual_seed(0)
    model, placeholders = MODELS[name]()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval(), placeholders


def pixels(name: str, images: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random pictures as the model's inputs."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if name == "qwen2_5_vl":
        grid = torch.tensor([[1, 4, 4]] * images)
        return {"pixel_values": noise(16 * images, 3 * 2 * 8 * 8), "image_grid_thw": grid}
    if name == "smolvlm":
        return {"pixel_values": noise(1, images, 3, 32, 32)}
    size = 32 if name == "internvl" else 16
    return {"pixel_values": noise(images, 3, size, size)}


def prompt(name: str, rows: list[list[int]], placeholders: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs: each row lists text lengths, an image stands between neighbours; shorter rows are padded left."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for lengths in rows:
        ids: list[int] = []
        for i, length in enumerate(lengths):
            if i:
                ids += [IMAGE_START, *[IMAGE] * placeholders, IMAGE_END]
            ids += torch.randint(2, 80, (length,), generator=generator).tolist()
        sequences.append(ids)
    longest = max(map(len, sequences))
    input_ids = torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in sequences])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
    images = sum(len(lengths) - 1 for lengths in rows)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if images:
        vision = pixels(name, images, generator)
        if name == "smolvlm" and len(rows) > 1:
            per_row = max(len(lengths) - 1 for lengths in rows)
            values = torch.zeros(len(rows), per_row, 3, 32, 32)
            flat, start = vision["pixel_values"][0], 0
            for row, lengths in enumerate(rows):
                count = len(lengths) - 1
                values[row, :count] = flat[start : start + count]
                start += count
            vision = {"pixel_values": values}
        inputs |= vision
        token_types = (input_ids == IMAGE).long()
        if name == "gemma3":
            inputs["token_type_ids"] = token_types
        if name == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = token_types
    return inputs
