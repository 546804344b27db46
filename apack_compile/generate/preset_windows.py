"""Whether a preset is worth packing the layers with a window for.

A preset may give every cache bases of its own, and a tail beside the tokens that a query sees: what pays for a long sequence need not
for the few tokens of a window.
"""

from collections.abc import Mapping
from dataclasses import replace

from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.cache.token_index import MAX_CROP
from apack_compile.config import AttentionPackConfig


def without_small_windows(
    kinds: list[LayerKind], config: AttentionPackConfig, widths: Mapping[int, int]
) -> list[LayerKind]:
    """Kinds of layers with the preset: those of a window that would take no fewer bytes packed keep transformers' own layers.

    widths: of a token's keys, over all KV heads, in each layer that can be packed.
    """
    can_be_packed, kept = list(widths), dict[int, str]()
    for window in {kind.window for kind in kinds if kind.layer in widths and kind.window is not None}:
        layers = [kind.layer for kind in kinds if kind.layer in widths and kind.window == window]
        held = 0.0
        for layer in layers:
            wanted = config.wanted([layer], window, can_be_packed)
            held += config.preset_options.numbers_held(wanted, widths[layer], window - 1 + MAX_CROP)
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
