"""Which tokens of a model's input are vision and which are padding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "image_patch_id",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
)


def placeholder_ids(config: Any) -> list[int]:
    """Token ids that stand for images, video or audio in a model's prompts."""
    ids = (getattr(config, name, None) for name in PLACEHOLDERS)
    return sorted({token for token in ids if isinstance(token, int)})


def vision_of(config: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Bool `[B, n]`: placeholder positions of `input_ids`; None when the inputs do not tell."""
    ids, placeholders = inputs.get("input_ids"), placeholder_ids(config)
    if ids is None or not placeholders:
        return None
    return torch.isin(ids, torch.tensor(placeholders, device=ids.device))


def padding_of(inputs: Mapping[str, Any], tokens: int, past: int = 0) -> Tensor | None:
    """Bool `[B, tokens]`: which of the `tokens` tokens after `past` ones the attention mask hides; None when it does not tell.

    The mask may be 2-D, or the 4-D one that generate prepares, or one of these per layer type.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping):
        kinds = ("full_attention", "indexed_attention", *mask)
        mask = next((mask[kind] for kind in kinds if kind in mask), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        seen = seen_by_themselves(mask[:, 0], tokens, past)
        return None if seen is None else ~(seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2)
    visible = mask != 0
    return ~visible[:, past : past + tokens] if visible.shape[1] >= past + tokens else None


def seen_by_themselves(mask: Tensor, tokens: int, past: int) -> Tensor | None:
    """Of a mask `[B, rows, columns]`, what each of the newest `tokens` tokens says of itself `[B, tokens]`; None where there are fewer.

    That holds whatever a layer sees: the last row of a window hides what is out of it. The columns may be those of a longer cache, or
    of the newest tokens alone.
    """
    rows, columns = mask.shape[1:]
    first = past if columns >= past + tokens else columns - tokens
    return mask[:, rows - tokens :].diagonal(first, 1, 2)[:, :tokens] if rows >= tokens and first >= 0 else None


def compact(flags: Tensor) -> Tensor:
    """Indices `[B, most]` of the set flags of each row `[B, n]`, in order, padded with -1."""
    counts = flags.sum(1)
    order = flags.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=flags.device) < counts[:, None], order, -1)
