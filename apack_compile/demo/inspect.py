"""`apack-compile inspect`: what would be packed in a model, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from apack_compile.plan import largest_ratio
from apack_compile.session import layer_kinds, signature_of

RATIOS = (2, 4, 8, 16)
DENSE_BYTES = 2


def inspect_lines(folder: Path | None) -> list[str]:
    """One line per layer, then what each ratio gives. Builds the model without weights; raises ValueError."""
    model, name = _empty_model(folder)
    kinds = layer_kinds(model)
    layers, heads, head_dim, _ = signature_of(model)
    width = heads * head_dim
    packed = sum(kind.reason is None for kind in kinds)
    dense_bytes = 2 * width * DENSE_BYTES
    lines = [
        f"{name}: {type(model).__name__}, {layers} layers, {heads} KV heads x {head_dim}",
        f"{'layer':>5}  {'kind':<22} {'W of K':>7} {'W of V':>7}  stored",
    ]
    for kind in kinds:
        stored = "packed" if kind.reason is None else f"dense ({kind.reason})"
        lines.append(f"{kind.layer:>5}  {kind.layer_type:<22} {width:>7} {width:>7}  {stored}")
    lines += [
        "",
        f"16-bit dense cache: {dense_bytes * len(kinds):,} bytes a token, {dense_bytes * packed:,} in packed layers",
        "packed layers at a ratio (long prompts; bases shared by all requests not counted):",
        f"{'ratio':>5}  {'bits a component':>16}  {'bytes a token':>13}",
    ]
    for ratio in RATIOS:
        if ratio > largest_ratio(width):
            lines.append(f"{ratio:>5}  out of reach: the largest ratio at W = {width} is {largest_ratio(width):.1f}")
        else:
            lines.append(f"{ratio:>5}  {16 / ratio:>16.2f}  {dense_bytes * packed / ratio:>13,.0f}")
    return lines


def _empty_model(folder: Path | None) -> tuple[Any, str]:
    """A model on the meta device and its name: the shapes are all that is needed."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if folder is None:
        from apack_compile.demo.assets import demo_config

        config, name = demo_config(), "demo model"
    else:
        if not (folder / "config.json").is_file():
            raise ValueError(f"MODEL_DIR={str(folder)!r} has no config.json; pass a local transformers model folder")
        name = str(folder)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"MODEL_DIR={name!r}: its config.json cannot be read ({error})") from error
    known = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if known else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False), name
