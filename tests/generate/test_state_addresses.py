"""A decode step writes the cache where it is: a captured CUDA graph would find every tensor again."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from llava_and_draft import calibrated, greedy, llava, picture
from preset_rows import EVERY_PRESET

import apack_compile

LOSSLESS, TIERS = {"preset": "lossless"}, {"preset": "a-vl"}
UNCOMPILED = [{"ratio": 4}, {"ratio": 5.2}, *EVERY_PRESET]
# The operations that write are the same, compiled or not: two settings use all of them.
CASES = [*((setting, "none") for setting in UNCOMPILED), (LOSSLESS, "eager"), (TIERS, "eager")]


def tensors(holder: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a dataclass, a named tuple, a list or a dictionary holds."""
    if isinstance(holder, torch.Tensor):
        yield path, holder
    elif isinstance(holder, dict):
        for name, value in holder.items():
            yield from tensors(value, f"{path}.{name}")
    elif is_dataclass(holder):
        for field in fields(holder):
            yield from tensors(getattr(holder, field.name), f"{path}.{field.name}")
    elif isinstance(holder, (list, tuple)):
        for i, value in enumerate(holder):
            yield from tensors(value, f"{path}[{i}]")


def state(cache) -> dict[str, tuple]:
    """Address, shape and strides of all that the cache's layers hold, by name."""
    holders = {"index": vars(cache.index)}
    for layer in cache.packed_layers:
        holders[f"layer {layer.layer_idx}"] = {**vars(layer), "tiers": vars(layer.tiers) if layer.tiers else None}
    held = [pair for name, holder in holders.items() for pair in tensors(holder, name)]
    return {name: (x.data_ptr(), x.shape, x.stride()) for name, x in held if x.device.type != "meta"}


@pytest.mark.parametrize(("setting", "compile"), CASES, ids=str)
def test_no_tensor_moves_over_20_steps(setting, compile):
    model = calibrated(llava(), compile, **setting)
    cache, seen = apack_compile.new_cache(model, 64), []

    def look(input_ids, scores):
        if not seen:
            cache.reserve(40)
        seen.append(state(cache))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    greedy(model, picture([60, 40, 40]), 21, past_key_values=cache, stopping_criteria=[look])
    assert len(seen) == 21 and len(seen[0]) > 50
    assert all(later == seen[0] for later in seen)


def test_growing_is_what_moves_tensors():
    model = calibrated(llava(), preset="lossless")
    cache = apack_compile.new_cache(model, 64)
    greedy(model, picture([60, 40]), 2, past_key_values=cache)
    before = state(cache)
    cache.reserve(400)
    assert {name.split(".")[-1].split("[")[0] for name in before if state(cache)[name] != before[name]} >= {"codes"}
