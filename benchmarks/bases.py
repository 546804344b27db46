"""What the bases that all requests share weigh beside a model's weights.

`python benchmarks/bases.py`: of three models, all layers, predicted from their configurations, in bfloat16 on a CPU; of SmolLM2-135M and
the demo's VLM, in float32, measured after a calibration on text and on pictures.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness import Row, print_table, write_json
from text_quality import calibrate_on_text, text_ids
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)
from vision_quality import calibrate_on_pictures

import apack_compile
from apack_compile.cache.accounting import shared_tensors, storage_bytes
from apack_compile.demo.assets import load_model, load_tokenizer
from apack_compile.demo.inspect import inspected_layers, shared_bases
from apack_compile.models.weights import weight_bytes
from apack_compile.plan.choice import Weights

RATIOS = (2.0, 4.0, 8.0, 16.0)
# Tokens of the prompts that are calibrated on and planned for, and pictures of one.
TEXT_TOKENS, PICTURES, PICTURE_TOKENS, VISION_SHARE = 2_240, 16, 1_149, 0.9


def known_configs() -> dict[str, Any]:
    """Configurations of models whose weights are not needed."""
    llava = LlavaConfig(
        text_config=LlamaConfig(vocab_size=32_064),
        vision_config=CLIPVisionConfig(
            hidden_size=1_024, intermediate_size=4_096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
    )  # fmt: skip
    qwen = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152_064, "hidden_size": 3_584, "intermediate_size": 18_944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        vision_config={"hidden_size": 1_280, "out_hidden_size": 3_584},
        tie_word_embeddings=False,
    )  # fmt: skip
    gemma = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=262_208, hidden_size=2_560, intermediate_size=10_240, num_hidden_layers=34,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1_024,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=1_152, intermediate_size=4_304, num_hidden_layers=27, num_attention_heads=16, image_size=896,
            patch_size=14,
        ),
    )  # fmt: skip
    return {"LLaVA-1.5-7B": llava, "Qwen2.5-VL-7B": qwen, "Gemma3-4B": gemma}


def predicted_rows(name: str, config: Any) -> Iterator[Row]:
    """A row for each ratio, from a configuration."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    packed = [layer for layer in inspected_layers(model) if layer.reason is None]
    weights = Weights(weight_bytes(model), pictures=True, coarse=True)
    for ratio in RATIOS:
        bases = shared_bases(packed, ratio, weights, model.dtype)
        row = row_of(name, "predicted", ratio, len(packed), bases.groups, weights.bytes, bases.bytes)
        yield row | {"dtype": str(bases.dtype).removeprefix("torch.")}


def measured_rows(name: str, model: nn.Module, tokens: int, vision_share: float) -> Iterator[Row]:
    """A row for each ratio, of a model that was calibrated."""
    for ratio in RATIOS:
        apack_compile.optimize(model, ratio=ratio, compile="none")
        plan = apack_compile.plan_for(model, tokens, vision_share)
        bases = storage_bytes(shared_tensors(plan))
        row = row_of(name, "measured", ratio, len(plan.layers), plan.groups, weight_bytes(model), bases)
        yield row | {"dtype": str(next(iter(plan.bases.values()))[0].decoder.dtype).removeprefix("torch.")}


def row_of(name: str, kind: str, ratio: float, layers: int, groups: int, weights: int, bases: int) -> Row:
    """One row."""
    return {
        "model": name,
        "kind": kind,
        "ratio": ratio,
        "layers": layers,
        "groups": groups,
        "weight_bytes": weights,
        "basis_bytes": bases,
        "share": bases / weights,
    }


def measured_models() -> Iterator[Row]:
    """The demo's VLM, whose language model SmolLM2 is, calibrated on text and on pictures."""
    model, tokenizer = load_model(), load_tokenizer()
    calibrate_on_text(model, text_ids(tokenizer), TEXT_TOKENS)
    yield from measured_rows("SmolLM2-135M, text", model, TEXT_TOKENS, 0.0)
    calibrate_on_pictures(model, tokenizer, PICTURES)
    yield from measured_rows("demo VLM, 16 pictures", model, PICTURE_TOKENS, VISION_SHARE)


def main(json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None) -> None:
    """Print the bytes of shared bases and their share of the weights."""
    rows = [row for name, config in known_configs().items() for row in predicted_rows(name, config)]
    rows += measured_models()
    print_table("bases that all requests share", rows)
    if json is not None:
        write_json(json, rows)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
