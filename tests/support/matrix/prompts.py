"""One prompt for a small model: text around a picture's placeholders, with pixel values of the shape that its processor makes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .shrink import FIRST_SPECIAL, IMAGE_SIZE, PATCH

GRID = IMAGE_SIZE // PATCH
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
# For models that are told by a mask where a picture is.
ANY_TOKEN = 399


def noise(*shape: int) -> Tensor:
    """Random values, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def one_picture(config: Any) -> dict[str, Tensor]:
    """One picture as it is."""
    return {"pixel_values": noise(1, 3, IMAGE_SIZE, IMAGE_SIZE)}


def sized_picture(config: Any) -> dict[str, Tensor]:
    """One picture and its size."""
    return {**one_picture(config), "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])}


def whole_and_tile(config: Any) -> dict[str, Tensor]:
    """The whole picture and its one tile."""
    return {**sized_picture(config), "pixel_values": noise(1, 2, 3, IMAGE_SIZE, IMAGE_SIZE)}


def pictures_of_row(config: Any) -> dict[str, Tensor]:
    """A list of pictures for each row of the batch."""
    return {"pixel_values": noise(1, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}


def masked_pictures_of_row(config: Any) -> dict[str, Tensor]:
    """A list of pictures for each row of the batch, with a mask of real pixels."""
    return {
        **pictures_of_row(config),
        "pixel_attention_mask": torch.ones(1, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long),
    }


def masked_tiles_of_row(config: Any) -> dict[str, Tensor]:
    """A list of tiles for each row of the batch, with a mask of real tiles."""
    return {**pictures_of_row(config), "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def crossed_pictures_of_row(config: Any) -> dict[str, Tensor]:
    """Pictures of a row that text attends to across: all of its tokens to all pictures."""
    return {**pictures_of_row(config), "image_attention_mask": torch.ones(1, 1, 1, dtype=torch.long)}


def crossed_tiles_of_row(config: Any) -> dict[str, Tensor]:
    """Four tiles of a row's one picture that text attends to across."""
    return {
        "pixel_values": noise(1, 1, 4, 3, IMAGE_SIZE, IMAGE_SIZE),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 1, 1, 4, dtype=torch.long),
    }


def patches_of_grid(config: Any) -> dict[str, Tensor]:
    """A flat patch per row, and how many there are in time, height and width."""
    tower = config.vision_config
    frames = getattr(tower, "temporal_patch_size", None) or getattr(tower, "patch_temporal", None) or 1
    return {
        "pixel_values": noise(GRID * GRID, 3 * frames * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, GRID, GRID]]),
    }


def square_patches_of_grid(config: Any) -> dict[str, Tensor]:
    """A patch `[3, P, P]` per row."""
    return {**patches_of_grid(config), "pixel_values": noise(GRID * GRID, 3, PATCH, PATCH)}


def merged_patches(config: Any) -> dict[str, Tensor]:
    """Two by two patches per row, channels last, and how many such rows there are in time, height and width."""
    return {
        "pixel_values": noise(GRID, 2 * PATCH, 2 * PATCH, 3),
        "image_grid_thw": torch.tensor([[1, GRID // 2, GRID // 2]]),
    }


def patches_in_time(config: Any) -> dict[str, Tensor]:
    """Patches of two frames, channels last."""
    return {"pixel_values": noise(GRID, 2, PATCH, PATCH, 3)}


def merging_patches_of_grid(config: Any) -> dict[str, Tensor]:
    """A flat patch per row, and how many are merged each way."""
    return {**patches_of_grid(config), "image_merge_sizes": torch.tensor([2])}


def patches_with_shape(config: Any) -> dict[str, Tensor]:
    """Flat patches of a picture, their mask, and how many there are in height and width."""
    return {
        "pixel_values": noise(1, GRID * GRID, 3 * PATCH * PATCH),
        "pixel_attention_mask": torch.ones(1, GRID * GRID, dtype=torch.long),
        "spatial_shapes": torch.tensor([[GRID, GRID]]),
    }


def patches_with_positions(config: Any) -> dict[str, Tensor]:
    """Flat patches of a picture, and the column and row of each."""
    places = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="xy"), -1).view(1, -1, 2)
    return {"pixel_values": noise(1, GRID * GRID, 3 * PATCH * PATCH).sigmoid(), "image_position_ids": places}


def strip_of_patches(config: Any) -> dict[str, Tensor]:
    """Patches side by side, and how many there are in height and width."""
    return {
        "pixel_values": noise(1, 3, PATCH, GRID * GRID * PATCH),
        "target_sizes": torch.tensor([[GRID, GRID]], dtype=torch.int32),
    }


def image_patches(config: Any) -> dict[str, Tensor]:
    """Flat patches of a picture, under a name of their own."""
    return {"image_patches": noise(1, GRID * GRID, 3 * PATCH * PATCH)}


def two_resolutions(config: Any) -> dict[str, Tensor]:
    """One picture, low and high."""
    return {**one_picture(config), "high_res_pixel_values": noise(1, 3, IMAGE_SIZE, IMAGE_SIZE)}


def with_instruction(config: Any) -> dict[str, Tensor]:
    """One picture and what the query transformer is asked."""
    return {**one_picture(config), "qformer_input_ids": torch.tensor([[5, 6, 7]])}


def frames_with_instruction(config: Any) -> dict[str, Tensor]:
    """Two frames and what the query transformer is asked."""
    return {**with_instruction(config), "pixel_values": noise(1, 2, 3, IMAGE_SIZE, IMAGE_SIZE)}


Pixels = Callable[[Any], dict[str, Tensor]]
# What a forward takes, by an argument that only such models have; the first that is there counts.
PIXELS_BY_ARGUMENT: dict[str, Pixels] = {
    "image_merge_sizes": merging_patches_of_grid,
    "image_grid_thw": patches_of_grid,
    "spatial_shapes": patches_with_shape,
    "image_position_ids": patches_with_positions,
    "target_sizes": strip_of_patches,
    "aspect_ratio_ids": crossed_tiles_of_row,
    "image_attention_mask": crossed_pictures_of_row,
    "high_res_pixel_values": two_resolutions,
    "qformer_input_ids": with_instruction,
    "pixel_attention_mask": masked_pictures_of_row,
    "image_patches": image_patches,
    "pixel_values": one_picture,
}


def pixels_for(model: nn.Module) -> Pixels | None:
    """What the model's forward takes, by its arguments; None where it sees no pictures."""
    names = inspect.signature(type(model).forward).parameters
    return next((pixels for name, pixels in PIXELS_BY_ARGUMENT.items() if name in names), None)


def prompt_for(model: nn.Module, pixels: Pixels | None, placeholders: int | None, tokens: int) -> dict[str, Tensor]:
    """Model inputs of one row: `tokens` text tokens with a picture after the first quarter; `pixels` None: text alone."""
    config, names = model.config, inspect.signature(type(model).forward).parameters
    vision = {} if pixels is None else pixels(config)
    if vision and placeholders is None:
        with torch.no_grad():
            encoder = model if hasattr(model, "get_image_features") else model.model
            placeholders = feature_rows(encoder.get_image_features(**vision))
    text = torch.randint(5, FIRST_SPECIAL - 20, (tokens,), generator=torch.Generator().manual_seed(3)).tolist()
    picture = [image_token(config)] * placeholders if vision and placeholders else []
    ids = text[: tokens // 4] + picture + text[tokens // 4 :]
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **vision}
    of_picture = torch.zeros_like(input_ids)
    of_picture[:, tokens // 4 : tokens // 4 + len(picture)] = 1
    for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = of_picture
    for name in ("image_attention_mask", "cross_attention_mask"):
        if name in inputs:
            inputs[name] = inputs[name].repeat_interleave(len(ids), dim=1)
    if "image_embeds_position_mask" in names:
        inputs["image_embeds_position_mask"] = of_picture.bool()
    return inputs


def image_token(config: Any) -> int:
    """The id that stands for a picture's token."""
    found = (getattr(config, name, None) for name in IMAGE_TOKENS)
    return next((token for token in found if isinstance(token, int)), ANY_TOKEN)


def feature_rows(features: Any) -> int:
    """How many tokens a picture's features are."""
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, (ModelOutput, Mapping)):
        return feature_rows(features["pooler_output"])
    return sum(feature_rows(part) for part in features)
