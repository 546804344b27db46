"""The caches that are measured: how each is made, filled from dense keys and values, and counted.

A row more is one `System` more: `make` gives an empty cache for the model, `held` counts a filled one.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from storage import HalfStates, Held, bytes_of
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import apack_compile
from apack_compile import AttentionPackConfig, AttentionPackOptions, AVLOptions
from apack_compile.models.cache_argument import with_cache
from apack_compile.plan.presets import SnapKVOptions

OURS = "apack-compile"
RANKS = (96, 48, 24)
States = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class System:
    """One cache: family (a line of the plot), setting (a point of it), how an empty one is made, how a filled one is counted.

    grain: its first update takes a multiple of so many tokens. reads_prompt: the model reads the prompt into it, because it needs
    to see the attention; the others are filled with the dense states. computes_in: dtype of the model that reads and answers; None for
    the model as it is.
    """

    family: str
    setting: str
    make: Callable[[nn.Module], Any]
    held: Callable[[Any, int], Held]
    note: str = ""
    grain: int = 1
    reads_prompt: bool = False
    computes_in: torch.dtype | None = None

    def model(self, model: nn.Module) -> nn.Module:
        """The model that reads and answers."""
        return model if self.computes_in is None else copy.deepcopy(model).to(self.computes_in)


def dense_bytes(states: States) -> int:
    """Bytes of the keys and values `[B, H_kv, T, D]` in 16 bits."""
    return sum(2 * (key.numel() + value.numel()) for key, value in states)


def filled(system: System, model: nn.Module, states: States, vision: Tensor | None) -> tuple[Any, Held]:
    """A cache of the dense states, `vision` `[1, T]` telling which tokens are a picture's, and its bytes."""
    cache = system.make(model)
    if isinstance(cache, apack_compile.CompactedCache):
        cache.expect(vision, None)
    tokens = states[0][0].shape[2]
    whole = tokens // system.grain * system.grain
    for start, end in ((0, whole), (whole, tokens)):
        for index, (key, value) in enumerate(states if start < end else []):
            cache.update(key[:, :, start:end], value[:, :, start:end], index)
    return cache, system.held(cache, dense_bytes(states))


@torch.no_grad()
def read(system: System, model: nn.Module, ids: Tensor, states: States, **inputs: Any) -> tuple[Any, Held]:
    """A cache that the model itself filled with the tokens `[T]`, and its bytes."""
    cache = system.make(model)
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    model(**with_cache(model, {"input_ids": ids[None], **inputs}, cache), logits_to_keep=1)
    return cache, system.held(cache, dense_bytes(states))


def dense_cache(model: nn.Module) -> DynamicCache:
    """transformers' dense cache."""
    return DynamicCache(config=model.config.get_text_config())


def all_tensors(cache: Any, dense: int) -> Held:
    """Every tensor of the cache."""
    return Held(bytes_of(cache), dense)


def own_report(cache: Any, dense: int) -> Held:
    """What a packed cache reports."""
    report = cache.report()
    return Held(report["sequence_bytes"], dense, report["model_bytes"])


def packed(family: str, setting: str, reads_prompt: bool = False, **options: Any) -> System:
    """A packed cache by the fields of its configuration; one that this version does not know fails when it is made."""

    def make(model: nn.Module) -> Any:
        apack_compile.optimize(model, AttentionPackConfig(compile="none", **options))
        return apack_compile.new_cache(model, 8)

    return System(family, setting, make, own_report, reads_prompt=reads_prompt)


def own_systems(ratios: Sequence[float]) -> list[System]:
    """Our budget plan at each ratio."""
    return [packed(OURS, f"ratio {ratio:g}", ratio=ratio) for ratio in ratios]


def attentionpack_systems() -> list[System]:
    """AttentionPack as published, at several ranks; the same with 4-bit coefficients, and with eviction too."""
    streams = ("vision_key", "vision_value", "text_key", "text_value")

    def system(rank: int, name: str = "", **options: Any) -> System:
        config = {"ranks": dict.fromkeys(streams, rank), "attentionpack": AttentionPackOptions(**options)}
        return packed("AttentionPack", f"rank {rank}{name}", True, preset="attentionpack", **config)

    four_bit = [system(rank, " + 4 bit", bits=4) for rank in (144, *RANKS[:2])]
    return [*map(system, RANKS), *four_bit, system(RANKS[0], " + 4 bit + eviction", bits=4, evict=0.5)]


def a_vl_systems() -> list[System]:
    """A-VL as published, and keeping half as much."""
    half = AVLOptions(core=0.15, secondary=0.25, text_kept=0.25)
    settings = {"core 30 %, stored 50 %": AVLOptions(), "core 15 %, stored 25 %": half}
    return [packed("A-VL", name, True, preset="a-vl", a_vl=options) for name, options in settings.items()]


def snapkv_systems() -> list[System]:
    """SnapKV by the part of a prompt that it keeps."""
    return [
        packed("SnapKV", f"1/{part} kept", True, preset="snapkv", options=SnapKVOptions(kept=1 / part))
        for part in (2, 4, 8)
    ]


def preset_systems() -> list[System]:
    """The published presets."""
    return [*attentionpack_systems(), *a_vl_systems(), *snapkv_systems()]


def dense_systems() -> list[System]:
    """The dense cache in 16 bits; and with a model that computes in bfloat16: what rounding changes where nothing is packed."""
    half = System("dense", "float16", lambda model: HalfStates(dense_cache(model)), all_tensors)
    bfloat16 = {"reads_prompt": True, "computes_in": torch.bfloat16}
    return [half, System("dense", "model in bfloat16", dense_cache, all_tensors, **bfloat16)]


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, chunk: int, **inputs: Any) -> States:
    """Exact keys and values of the tokens `[T]`, read in chunks."""
    cache = dense_cache(model)
    for part in ids[None].split(chunk, dim=1):
        model(**with_cache(model, {"input_ids": part, **inputs}, cache), logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]
