"""The call of `scaled_dot_product_attention`, as models make it."""

from typing import Any

import torch

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
ATTENTION = torch.nn.functional.scaled_dot_product_attention


def named_arguments(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the function's own defaults."""
    given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    return {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False, **given}
