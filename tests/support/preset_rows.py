"""The presets, and the plain implementation that each is compared with. Every preset has a row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from preset_papers import PlainAttentionPack, PlainAVL, PlainMethod, PlainSnapKV

from apack_compile.plan.presets import PRESETS, AttentionPackOptions, AVLOptions, SnapKVOptions


@dataclass(frozen=True)
class Row:
    """A preset's settings, its plain implementation with the same ones, and how closely they are compared.

    steps: steps of each sequence compared on average, at least, before a choice that rounding may decide.
    """

    plain: Callable[[Any], PlainMethod]
    steps: int
    config: dict[str, Any] = field(default_factory=dict)


RANKS = {"vision_key": 8, "vision_value": 8, "text_key": 64, "text_value": 64}
A_VL = AVLOptions(core=0.3, secondary=0.6, core_every=3, text_kept=0.6, text_first=5, text_heavy=0.7, text_every=4)

PRESET_ROWS = {
    "lossless": Row(PlainMethod, 14),
    "attentionpack": Row(
        lambda m: PlainAttentionPack(m, 8, 0.25, 0.25, 0.25), 4, {"ranks": RANKS, "options": AttentionPackOptions()}
    ),
    "a-vl": Row(lambda m: PlainAVL(m, 0.3, 0.6, 3, 0.6, 5, 0.7, 4), 8, {"options": A_VL}),
    "snapkv": Row(lambda m: PlainSnapKV(m, 0.4, 9, 5), 8, {"options": SnapKVOptions(kept=0.4, window=9, kernel=5)}),
}

# Presets as settings of `optimize`, and those of them that drop tokens or read some in part.
EVERY_PRESET = [{"preset": name} for name in PRESETS]
TIERED_PRESETS = [setting for setting in EVERY_PRESET if setting["preset"] != "lossless"]
