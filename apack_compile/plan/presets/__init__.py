"""The published presets, each in a file of its own. A new one is listed here."""

from apack_compile.plan.presets.a_vl import AVLOptions
from apack_compile.plan.presets.attentionpack import AttentionPackOptions
from apack_compile.plan.presets.base import Preset
from apack_compile.plan.presets.lossless import LosslessOptions

# By name.
PRESETS: dict[str, type[Preset]] = {
    preset.name: preset for preset in (LosslessOptions, AttentionPackOptions, AVLOptions)
}
