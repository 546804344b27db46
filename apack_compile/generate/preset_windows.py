"""Preset "attentionpack" in layers with a window: a dense tail that suits it, and whether it is worth packing.

There every cache has bases of its own, and a tail beside the tokens that a query sees: what pays for a long sequence need not for the
few tokens of a window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from apack_compile.cache.cache import LayerKind
from apack_compile.cache.token_index import MAX_CROP
from apack_compile.config import MIN_TAIL_SLOTS, AttentionPackConfig
from apack_compile.plan.plan import STREAMS
from apack_compile.plan.ring import BLOCK_SHARE


def tail_for(tail_slots: int, window: int | None) -> int:
    """Newest tokens to keep dense: as asked, but of a window an eighth, or the fewest that fitted bases allow."""
    return tail_slots if window is None else max(min(tail_slots, int(window * BLOCK_SHARE)), MIN_TAIL_SLOTS)


def without_small_windows(
    kinds: list[LayerKind], config: AttentionPackConfig, widths: Mapping[int, int]
) -> list[LayerKind]:
    """Kinds of layers with the preset: those of a window that would take no fewer bytes packed keep transformers' own layers.

    widths: of a token's keys, over all KV heads, in each layer that can be packed.
    """
    can_be_packed, kept = list(widths), dict[int, str]()
    for window in {kind.window for kind in kinds if kind.layer in widths and kind.window is not None}:
        layers = [kind.layer for kind in kinds if kind.layer in widths and kind.window == window]
        held = sum(numbers_held(config, can_be_packed, layer, widths[layer], window) for layer in layers)
        share = held / sum(2 * window * widths[layer] for layer in layers)
        if share >= 1:
            reason = (
                f"its window of {window} tokens would take {share:.0%} of the dense bytes with preset={config.preset!r}"
            )
            kept |= dict.fromkeys(layers, reason)
    return [
        replace(kind, reason=f"{kind.layer_type}: {kept[kind.layer]}", compileable=False)
        if kind.layer in kept
        else kind
        for kind in kinds
    ]


def numbers_held(config: AttentionPackConfig, can_be_packed: list[int], layer: int, width: int, window: int) -> float:
    """16-bit numbers that a full window of text takes in a layer; raises ValueError for ranks of another number of layers."""
    tokens, held = window - 1 + MAX_CROP, 0.0
    for name in (f"text_{stream}" for stream in STREAMS):
        given = ranks_of(config.ranks[name], can_be_packed, [layer], name)
        rank = min(given if isinstance(given, int) else given[0], width)
        packed = rank * (tokens * config.attentionpack.bits / 16 + width) + width
        held += tail_for(config.tail_slots, window) * width + min(packed, tokens * width)
    return held


def ranks_of(given: int | Sequence[int], can_be_packed: list[int], layers: list[int], name: str) -> int | list[int]:
    """Ranks of some layers, of one rank for all that can be packed or one for each; raises ValueError where they are not as many."""
    if isinstance(given, int):
        return given
    if len(given) != len(can_be_packed):
        raise ValueError(f"ranks: {name} has {len(given)} ranks, but {len(can_be_packed)} layers can be packed")
    return [given[can_be_packed.index(layer)] for layer in layers]
