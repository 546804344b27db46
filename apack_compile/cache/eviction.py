"""Tokens of a layer that are evicted, where a preset drops some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apack_compile.cache.first_choice import FirstChoice, Floor, can_choose
from apack_compile.cache.host_copy import HostCopy

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer


# Layers that wait for the host to know how many tokens stay: a device that is so far behind has work while it reads.
LAYERS_BEHIND = 2


@dataclass(frozen=True)
class Eviction:
    """Of some tokens of a layer, text before position `end` alone, the rest stays: bool `[B, slots]` by modality.

    counts: on their way to the host, how many stay at most in a row, where only the device knows it.
    """

    layer: "CompactedLayer"
    keep: Mapping[str, Tensor]
    end: int
    counts: HostCopy | None

    def finish(self) -> Floor | None:
        """Evict them; first position that can be cropped after it, None for any."""
        tiers, pairs, keep = self.layer.tiers, self.layer.pairs, self.keep
        known = [tiers.most_kept(name) for name in keep] if self.counts is None else map(int, self.counts.read())
        most = dict(zip(keep, known, strict=True))
        if "vision" in keep and keep["vision"].numel():
            pairs["vision"] = tiers.keep_vision(pairs["vision"], keep["vision"], most["vision"])
        return _keep_text(self.layer, keep["text"], self.end, most["text"]) if "text" in keep else None


def begin(layer: "CompactedLayer", pools: Sequence[tuple[str, ...]], end: int) -> Eviction:
    """Choose the tokens of these pools that go, text before position `end` alone, which has been counted."""
    tiers, known = layer.tiers, layer.index.budgets
    keep = {name: flags for pool in pools for name, flags in tiers.chosen(pool, end - layer.origin).items()}
    for pool in pools:
        tiers.count_kept(pool, known)
    if all(tiers.most_kept(name) is not None for name in keep):
        return Eviction(layer, keep, end, None)
    # only the device knows how modalities that compete share a budget
    return Eviction(layer, keep, end, HostCopy(torch.stack([flags.sum(1).max() for flags in keep.values()])))


def evict(layer: "CompactedLayer", pools: Sequence[tuple[str, ...]], end: int) -> Floor | None:
    """Evict tokens of these pools, text before position `end` alone; first position that can be cropped after it, None for any."""
    if any("text" in pool for pool in pools):
        layer.tiers.count_text(end)
    return _of_first_prompt(layer, pools, end) if can_choose(layer.tiers, pools) else begin(layer, pools, end).finish()


@dataclass(frozen=True)
class Settling:
    """A layer that has taken the importance of a prompt's tokens. eviction: None where it has evicted what goes; floor: as then."""

    layer: "CompactedLayer"
    eviction: Eviction | None
    floor: Floor | None

    @staticmethod
    @torch.no_grad()
    def begin(layer: "CompactedLayer", importance: Tensor, end: int) -> "Settling":
        """Take the `importance` `[B, T]` by position, and evict text before position `end`, where the host knows how much."""
        tiers = layer.tiers
        pools = tiers.rule.pools
        tiers.observe(importance)
        tiers.is_ranked = False
        if any("text" in pool for pool in pools):
            tiers.count_text(end)
        if can_choose(tiers, pools):
            return Settling(layer, None, _of_first_prompt(layer, pools, end))
        eviction = begin(layer, pools, end)
        return Settling(layer, eviction, None) if eviction.counts else Settling(layer, None, eviction.finish())

    @torch.no_grad()
    def finish(self) -> Floor | None:
        """Evict what is left to evict, and rank; first position that can be cropped after it, None for any."""
        tiers, floor = self.layer.tiers, self.floor if self.eviction is None else self.eviction.finish()
        if tiers.is_ranked:
            tiers.read_some()
            self.layer.follow_tensors()
        else:
            self.layer.rank()
        tiers.settled = True
        return floor


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


def _keep_text(layer: "CompactedLayer", keep: Tensor, end: int, most: int) -> Floor:
    """Evict text before position `end`, in place where the slots stay as many."""
    pair, tiers = layer.pairs["text"], layer.tiers
    kept, recent = tiers.keep_text(pair.tensors, keep, end, most)
    if not tiers.settled:
        slots = kept + pair.slots - (end - layer.origin)
        layer.pairs["text"] = pair.with_tokens(lambda x: x[:, :, :slots].clone())
        tiers.keep_text_slots(slots)
    layer.move_origin(end - kept)
    return Floor(end, recent)
