"""The caches that are measured: how each is made, filled from dense keys and values, and counted.

A row more is one `System` more: `make` gives an empty cache for the model, `held` counts a filled one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fp8 import Fp8Layer
from storage import HalfStates, Held, bytes_of
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

import apack_compile
from apack_compile import AttentionPackConfig

OURS = "apack-compile"
RANKS = (96, 48, 24)
# QuantizedCache packs whole groups of tokens only; the rest of a prompt waits in its residual window, made wide enough for
# the rest and a conversation (a window that overflows at an odd length raises).
GROUP = 64
RESIDUAL = 320
States = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class System:
    """One cache: family (a line of the plot), setting (a point of it), how an empty one is made, how a filled one is counted.

    grain: its first update takes a multiple of so many tokens.
    """

    family: str
    setting: str
    make: Callable[[nn.Module], Any]
    held: Callable[[Any, int], Held]
    note: str = ""
    grain: int = 1


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


def packed(family: str, setting: str, **options: Any) -> System:
    """A packed cache by the fields of its configuration; one that this version does not know fails when it is made."""

    def make(model: nn.Module) -> Any:
        apack_compile.optimize(model, AttentionPackConfig(compile="none", **options))
        return apack_compile.new_cache(model, 8)

    return System(family, setting, make, own_report)


def own_systems(ratios: Sequence[float]) -> list[System]:
    """Our budget plan at each ratio."""
    return [packed(OURS, f"ratio {ratio:g}", ratio=ratio) for ratio in ratios]


def attentionpack_systems() -> list[System]:
    """The paper's truncated SVD per sequence."""
    streams = ("vision_key", "vision_value", "text_key", "text_value")
    return [
        packed("AttentionPack", f"rank {rank}", preset="attentionpack", ranks=dict.fromkeys(streams, rank))
        for rank in RANKS
    ]


def quantized(backend: str, bits: int | None, **axes: int) -> System:
    """transformers' QuantizedCache; integers by group of 64, fp8 by tensor."""

    def make(model: nn.Module) -> HalfStates:
        options = axes if bits is None else {"nbits": bits, "residual_length": RESIDUAL, "q_group_size": GROUP, **axes}
        return HalfStates(QuantizedCache(backend, model.config, **options))

    note = ", ".join(f"{name} {axis}" for name, axis in axes.items())
    return System(
        backend,
        "scale per tensor" if bits is None else f"{bits} bit",
        make,
        all_tensors,
        note,
        1 if bits is None else GROUP,
    )


def fp8() -> System:
    """float8_e4m3fn with a scale per token and head."""

    def make(model: nn.Module) -> HalfStates:
        return HalfStates(Cache(layers=[Fp8Layer() for _ in range(model.config.get_text_config().num_hidden_layers)]))

    return System("fp8", "scale per token", make, all_tensors)


def turboquant(bits: int) -> System:
    """turboquant-vllm's cache: random rotation and Lloyd-Max codes."""

    def make(model: nn.Module) -> HalfStates:
        from turboquant_vllm import CompressedDynamicCache

        config = model.config.get_text_config()
        inner = dense_cache(model)
        CompressedDynamicCache(inner, config.head_dim, bits=bits, model_config=config)
        return HalfStates(inner)

    note = "" if bits == 4 else "one byte per code"
    return System("turboquant", f"{bits} bit", make, turboquant_held, note)


def turboquant_held(cache: HalfStates, dense: int) -> Held:
    """Codes and norms; rotation and codebook apart, and the decoded copy that the cache also keeps."""
    compressed = cache.inner.update.__self__
    codes = bytes_of([compressed._compressed_keys, compressed._compressed_values])
    shared = bytes_of([compressed._key_compressors, compressed._value_compressors])
    return Held(codes, dense, shared, bytes_of([compressed._decompressed_k, compressed._decompressed_v]))


def peer_systems() -> list[System]:
    """What else can be had for transformers; axes are the best ones of those that a backend offers, for its bits, on text."""
    return [
        *attentionpack_systems(),
        fp8(),
        quantized("fp8", None),
        *(quantized("hqq", bits, axis_key=1, axis_value=1) for bits in (8, 4)),
        quantized("hqq", 2, axis_key=0, axis_value=1),
        *(quantized("quanto", bits, axis_key=-1, axis_value=0) for bits in (4, 2)),
        *(turboquant(bits) for bits in (4, 3)),
    ]


def dense_system() -> System:
    """The dense cache in 16 bits."""
    return System("dense", "float16", lambda model: HalfStates(dense_cache(model)), all_tensors)


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, chunk: int, **inputs: Any) -> States:
    """Exact keys and values of the tokens `[T]`, read in chunks."""
    cache = dense_cache(model)
    for part in ids[None].split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1, **inputs)
    return [(layer.keys, layer.values) for layer in cache.layers]
