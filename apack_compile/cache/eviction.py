"""Tokens of a layer that are evicted, where a preset drops some."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from apack_compile.cache.first_choice import FirstChoice, Floor, can_choose

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer


def evict(layer: "CompactedLayer", pools: Sequence[tuple[str, ...]], end: int) -> Floor | None:
    """Evict tokens of these pools, text before position `end` alone; first position that can be cropped after it, None for any."""
    tiers, pairs, known = layer.tiers, layer.pairs, layer.index.budgets
    if any("text" in pool for pool in pools):
        tiers.count_text(end)
    if can_choose(tiers, pools):
        return _of_first_prompt(layer, pools, end)
    keep = {name: flags for pool in pools for name, flags in tiers.chosen(pool, end - layer.origin).items()}
    for pool in pools:
        tiers.count_kept(pool, known)
    if "vision" in keep and keep["vision"].numel():
        pairs["vision"] = tiers.keep_vision(pairs["vision"], keep["vision"])
    return _keep_text(layer, keep["text"], end) if "text" in keep else None


def _of_first_prompt(layer: "CompactedLayer", pools: Sequence[tuple[str, ...]], end: int) -> Floor | None:
    """The same of a first prompt, where layers share what they know."""
    tiers, pairs, choices, floor = layer.tiers, layer.pairs, layer.index.choices, None
    for (name,) in pools:
        tiers.count_kept((name,), layer.index.budgets)
        used = end - layer.origin if name == "text" else pairs["vision"].slots
        if (name, used) not in choices:
            choices[name, used] = FirstChoice.of(tiers, name, used)
        choice = choices[name, used]
        if name == "vision" and used:
            pairs[name] = tiers.choose_vision(pairs[name], choice)
        elif name == "text":
            pairs[name], recent = tiers.choose_text(pairs[name], choice)
            layer.move_origin(end - choice.most)
            floor = Floor(end, recent)
    return floor


def _keep_text(layer: "CompactedLayer", keep: Tensor, end: int) -> Floor:
    """Evict text before position `end`, in place where the slots stay as many."""
    pair, tiers = layer.pairs["text"], layer.tiers
    kept, recent = tiers.keep_text(pair.tensors, keep, end)
    if not tiers.settled:
        slots = kept + pair.slots - (end - layer.origin)
        layer.pairs["text"] = pair.with_tokens(lambda x: x[:, :, :slots].clone())
        tiers.keep_text_slots(slots)
    layer.move_origin(end - kept)
    return Floor(end, recent)
