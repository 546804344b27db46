"""The published presets, each in a file of its own. A new one is listed here; users import its options from apack_compile."""

from apack_compile.plan.presets.a_vl import AVLOptions
from apack_compile.plan.presets.attentionpack import AttentionPackOptions
from apack_compile.plan.presets.base import Preset
from apack_compile.plan.presets.lossless import LosslessOptions
from apack_compile.plan.presets.snapkv import SnapKVOptions

__all__ = ["AVLOptions", "AttentionPackOptions", "SnapKVOptions"]

# By name.
PRESETS: dict[str, type[Preset]] = {
    preset.name: preset for preset in (LosslessOptions, AttentionPackOptions, AVLOptions, SnapKVOptions)
}
