"""`apack-compile inspect`: what would be packed in a model, from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from apack_compile.cache.accounting import DENSE_ELEMENT_BYTES
from apack_compile.cache.layer_kinds import LATENT_ATTENTION, layer_kinds
from apack_compile.checks import counted, size
from apack_compile.models.modality import placeholder_ids
from apack_compile.models.weights import weight_bytes
from apack_compile.plan.bits import largest_ratio
from apack_compile.plan.choice import PackedLayers, Weights, alike, head_groups_for, predicted_basis_bytes
from apack_compile.plan.plan import BASIS_DTYPES
from apack_compile.plan.rotation import BLOCK

RATIOS = (2, 4, 8, 16)
TOTALS = (8_192, 32_768)


@dataclass(frozen=True)
class InspectedLayer:
    """One layer of the cache: KV heads, widths `W` of its keys and values over all heads, and how many tokens it keeps (None: all)."""

    kind: str
    query_heads: int
    heads: int
    widths: tuple[int, int]
    window: int | None
    reason: str | None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in 16 bits."""
        return sum(self.widths) * DENSE_ELEMENT_BYTES

    def dense_bytes(self, tokens: int) -> int:
        """Bytes of a sequence's cache in 16 bits."""
        return self.token_bytes * (tokens if self.window is None else min(tokens, self.window))


def inspect_lines(path: Path | None) -> list[str]:
    """Layers in groups of equal ones, then totals before and after packing. Builds the model without weights; raises ValueError."""
    model, name = _empty_model(path)
    try:
        layers = inspected_layers(model)
    except ValueError as error:
        raise ValueError(f"MODEL={name!r}: {error}") from error
    if not any(layer.token_bytes for layer in layers):
        raise ValueError(
            f"MODEL={name!r}: {type(model).__name__} has no KV cache: none of its layers holds keys and values"
        )
    weights = Weights(weight_bytes(model), pictures=bool(placeholder_ids(model.config)), coarse=True)
    return [
        f"{name}: {type(model).__name__}, {counted(len(layers), 'layer')}",
        f"{'layers':<20} {'kind':<20} {'KV heads':>8} {'W of K':>7} {'W of V':>7} {'tokens kept':>12}  stored",
        *_group_lines(layers),
        "",
        *_dense_lines(layers),
        "",
        f"weights in {str(model.dtype).removeprefix('torch.')}: {size(weights.bytes)}; quantized ones are fewer",
        *_packed_lines(layers, weights, model.dtype),
    ]


def inspected_layers(model: Any) -> list[InspectedLayer]:
    """What the config says about each layer of the model's cache."""
    from transformers.cache_utils import DynamicCache

    config = model.config.get_text_config(decoder=True)
    layers = []
    for kind, own in zip(layer_kinds(model), DynamicCache(config=config).layers, strict=True):
        one = config.per_layer_config[kind.layer] if config.is_heterogeneous else config
        query_heads = getattr(one, "num_attention_heads", None) or 1
        heads = getattr(one, "num_key_value_heads", None) or query_heads
        head_dim = getattr(one, "head_dim", None) or one.hidden_size // query_heads
        widths = (heads * head_dim, heads * head_dim)
        if kind.layer_type == LATENT_ATTENTION:
            widths = (one.kv_lora_rank, one.qk_rope_head_dim)
        window = getattr(own, "sliding_window", None)
        widths = widths if kind.has_keys else (0, 0)
        layers.append(InspectedLayer(kind.layer_type, query_heads, heads, widths, window, kind.reason))
    return layers


def ranges_of(numbers: list[int]) -> str:
    """Numbers in order as ranges: 0-4, 6."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _group_lines(layers: list[InspectedLayer]) -> list[str]:
    """A line for all layers that are alike."""
    lines = []
    for layer in dict.fromkeys(layers):
        which = ranges_of([i for i, other in enumerate(layers) if other == layer])
        kept = "all" if layer.window is None else f"last {layer.window:,}"
        key, value = layer.widths
        stored = "packed" if layer.reason is None else f"dense ({layer.reason})" if layer.token_bytes else layer.reason
        lines.append(f"{which:<20} {layer.kind:<20} {layer.heads:>8} {key:>7} {value:>7} {kept:>12}  {stored}")
    return lines


def _dense_lines(layers: list[InspectedLayer]) -> list[str]:
    """Bytes of a sequence's dense cache."""
    lines = [f"one sequence in 16 bits: {sum(layer.token_bytes for layer in layers):,} bytes a token in all layers"]
    for tokens in TOTALS:
        dense = sum(layer.dense_bytes(tokens) for layer in layers)
        limited = sum(layer.dense_bytes(tokens) for layer in layers if layer.window is not None)
        kept = sum(layer.dense_bytes(tokens) for layer in layers if layer.reason is not None)
        parts = [f"{size(limited)} in layers with a window"] if limited else []
        parts += [f"{size(kept)} in layers that stay dense"] if kept else []
        lines.append(f"{tokens:>7,} tokens: {size(dense)} dense" + (f", {', '.join(parts)}" if parts else ""))
    return lines


def _packed_lines(layers: list[InspectedLayer], weights: Weights, dtype: torch.dtype) -> list[str]:
    """For each ratio: bytes of a sequence's cache where some layers are packed, and of the bases that all requests share."""
    packed = [layer for layer in layers if layer.reason is None]
    if not packed:
        return ["no layer would be packed"]
    totals = "  ".join(f"{f'{tokens:,} tokens':>20}" for tokens in TOTALS)
    lines = [
        "with optimize(model, ratio=...), layers that stay dense counted; shared bases (predicted, CPU) are stored once for all",
        f"{'ratio':>5}  {'bits a component':>16}  {totals}  {'shared bases':>12}  {'of weights':>10}  {'head groups':>11}",
    ]
    narrowest = min(min(layer.widths) for layer in packed)
    for ratio in RATIOS:
        if ratio > largest_ratio(narrowest):
            lines.append(
                f"{ratio:>5}  out of reach: the largest ratio at W = {narrowest} is {largest_ratio(narrowest):.1f}"
            )
            continue
        cells = []
        for tokens in TOTALS:
            dense = sum(layer.dense_bytes(tokens) for layer in layers)
            held = sum(layer.dense_bytes(tokens) / (ratio if layer.reason is None else 1) for layer in layers)
            cells.append(f"{f'{size(held)} ({dense / held:.2f}x)':>20}")
        bases = shared_bases(packed, ratio, weights, dtype)
        share = f"{bases.bytes / weights.bytes:.1%}"
        lines.append(
            f"{ratio:>5}  {16 / ratio:>16.2f}  {'  '.join(cells)}  {size(bases.bytes):>12}  {share:>10}  {bases.groups:>11}"
        )
    return lines


@dataclass(frozen=True)
class SharedBases:
    """Bytes of the bases of all packed layers, what they are stored in, and head groups."""

    bytes: int
    dtype: torch.dtype
    groups: int


def shared_bases(packed: list[InspectedLayer], ratio: float, weights: Weights, dtype: torch.dtype) -> SharedBases:
    """The bases of a model in a dtype on a CPU, as the time model and typical variances predict them."""
    layers = alike(
        PackedLayers(one.query_heads, one.heads, one.widths[0] // one.heads, has_window=one.window is not None)
        for one in packed
    )
    groups = head_groups_for(layers, dtype, ratio, BLOCK, "cpu", weights).count
    found = {kind: predicted_basis_bytes(layers, ratio, groups, weights, kind.itemsize) for kind in BASIS_DTYPES}
    kind = next((kind for kind, size in found.items() if size <= weights.limit), BASIS_DTYPES[-1])
    return SharedBases(found[kind], kind, groups)


def _empty_model(path: Path | None) -> tuple[Any, str]:
    """A model on the meta device and its name: the shapes are all that is needed."""
    if path is None:
        from apack_compile.demo.assets import demo_config

        config, name = demo_config(), "demo model"
    else:
        config, name = config_at(path), str(path)
    auto = auto_class(config, name)
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False), name


def auto_class(config: Any, name: str) -> Any:
    """Which of transformers' classes loads the model of a configuration; raises ValueError for one that generates no text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    autos = (AutoModelForImageTextToText, AutoModelForCausalLM)
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if auto is None:
        raise ValueError(
            f"MODEL={name!r}: {type(config).__name__} belongs to no model that generates text; pass a decoder's config"
        )
    return auto


def config_at(path: Path) -> Any:
    """The configuration in a model folder, or in a file; raises ValueError."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"MODEL={str(path)!r} does not exist; pass a local model folder or its config.json")
    if not file.is_file():
        raise ValueError(f"MODEL={str(path)!r} has no config.json; pass a local transformers model folder")
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"MODEL={str(file)!r} is no JSON that can be read ({error})") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None:
        raise ValueError(f"MODEL={str(file)!r} has no model_type; pass the config.json of a transformers model")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"MODEL={str(file)!r}: model_type={kind!r} is none that transformers {__version__} knows")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a model's own config class makes of bad values
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"MODEL={str(file)!r} cannot be read ({type(error).__name__}: {first})") from error
