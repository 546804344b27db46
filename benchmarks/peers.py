"""Caches that can be had for transformers besides ours, at settings as good as they offer."""

from fp8 import Fp8Layer
from storage import HalfStates, Held, bytes_of
from systems import System, all_tensors, dense_cache
from torch import nn
from transformers.cache_utils import Cache, QuantizedCache

# QuantizedCache packs whole groups of tokens only; the rest of a prompt waits in its residual window, made wide enough for
# the rest and a conversation (a window that overflows at an odd length raises).
GROUP = 64
RESIDUAL = 320


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
        fp8(),
        quantized("fp8", None),
        *(quantized("hqq", bits, axis_key=1, axis_value=1) for bits in (8, 4)),
        quantized("hqq", 2, axis_key=0, axis_value=1),
        *(quantized("quanto", bits, axis_key=-1, axis_value=0) for bits in (4, 2)),
        *(turboquant(bits) for bits in (4, 3)),
    ]
