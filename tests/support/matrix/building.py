"""A small model of any type, with random weights that let every part matter."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.models.auto import modeling_auto

from .cases import CASES, Case
from .shrink import SHORT_WINDOW, small_config

WEIGHT, ZERO_WEIGHT = 0.15, 0.1


def class_names() -> dict[str, str]:
    """Model types and the names of their classes: pictures and text to text, then those that also take video or sound."""
    video = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    return {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **video}


def case_of(model_type: str) -> Case:
    """What is special about a type."""
    return CASES.get(model_type, Case())


def build(model_type: str, window: int = SHORT_WINDOW) -> nn.Module:
    """A model in float32, in eval mode, that generates without an end; window: of layers that have one."""
    case = case_of(model_type)
    config = small_config(model_type, case.config, window)
    if case.tower is not None:
        tower = dict(case.tower)
        # configs check the type of their parts; this one is another on purpose
        object.__setattr__(config, "vision_config", CONFIG_MAPPING[tower.pop("model_type")](**tower))
    torch.manual_seed(0)
    model = getattr(transformers, class_names()[model_type])(config).eval()
    randomize(model)
    for name, value in case.attributes.items():
        setattr(model, name, value)
    for module in model.modules():
        settings: Any = vars(module).get("generation_config")
        if isinstance(settings, GenerationConfig):
            settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = None, 0, 1
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Larger weights than a training starts from, and none that are zero: gates that start closed would hide what is behind them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() >= 2:
            parameter.normal_(0, WEIGHT, generator=generator)
        elif not bool(parameter.any()):
            parameter.normal_(0, ZERO_WEIGHT, generator=generator)
