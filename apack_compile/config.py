"""User-facing configuration."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from apack_compile.checks import is_ratio
from apack_compile.plan.plan import MIN_TAIL_SLOTS
from apack_compile.plan.presets import PRESETS, AttentionPackOptions, AVLOptions
from apack_compile.plan.presets.base import Layers, Preset
from apack_compile.plan.time_model import OF_TYPE, PREFERENCES

COMPILE_MODES = ("auto", "inductor", "aot_eager", "eager", "none")
DEFAULT_RATIO = 4.0
# Presets whose options have a field of their own.
OPTION_FIELDS: dict[str, type[Preset]] = {"attentionpack": AttentionPackOptions, "a_vl": AVLOptions}


@dataclass(frozen=True)
class AttentionPackConfig:
    """What `optimize` does to a model.

    Give ratio or preset; neither means ratio 4. Raises ValueError naming the argument.

    - ratio: bytes of a dense 16-bit cache over bytes of the packed one, a finite number > 1. Bases that all requests share are not counted.
    - preset: "lossless", "attentionpack", "a-vl" or "snapkv".
    - options: of the preset, an instance of its class; None: its defaults.
    - key_block: with a ratio, keys are rotated back to the start of their block of so many slots. Fewer give better quality and
      slower attention; 0 leaves keys rotated. On CUDA, powers of two from 16 up have a fast kernel, others the reference. None: as
      the time model chooses for the device, with head_groups.
    - head_groups: with a ratio, into how many groups the KV heads are split that share a basis. 1 gives the best quality; more is
      faster on models with many heads. None: as the time model chooses: of what is fast enough, what loses least.
    - prefer: how fast is fast enough for that choice: "quality", "balanced" or "speed".
    - planned_device: the type of device that plans are made for, "cpu" or "cuda". None: the model's.
    - coarse: from a ratio of 5 and 1,024 tokens on, of which kinds ("text", "vision") tokens that are expected to matter less get
      fewer bits.
    - min_tokens: a generate call whose prompt and new tokens are fewer, in a row of the batch, keeps transformers' own cache.
      None: the device's default with a ratio, 0 with a preset.
    - ranks, tail_slots, attentionpack: for that preset, components kept per modality and stream (for all layers, or a list with
      one per packed layer), newest tokens that stay dense until they are packed, and its other options.
    - a_vl: options of that preset, as `options` too.
    - quantize: short name of a torchao weight quantization.
    - compile: how decode steps are compiled.
    - strict: raise where attention that reads the packed cache is not rewritten.
    """

    ratio: float | None = None
    preset: str | None = None
    options: Preset | None = None
    ranks: dict[str, int | list[int]] = field(
        default_factory=lambda: {"vision_key": 64, "vision_value": 64, "text_key": 64, "text_value": 64}
    )
    tail_slots: int = 64
    key_block: int | None = None
    head_groups: int | None = None
    coarse: tuple[str, ...] = ("text",)
    attentionpack: AttentionPackOptions = field(default_factory=AttentionPackOptions)
    a_vl: AVLOptions = field(default_factory=AVLOptions)
    quantize: str | None = None
    compile: str = "auto"
    strict: bool = False
    min_tokens: int | None = None
    prefer: str = "balanced"
    planned_device: str | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.preset is not None:
            raise ValueError(f"ratio={self.ratio!r} and preset={self.preset!r} exclude each other; pass one of them")
        if self.ratio is None and self.preset is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        if self.ratio is not None and not is_ratio(self.ratio):
            raise ValueError(f"ratio={self.ratio!r} must be a finite number > 1")
        if self.preset is not None and self.preset not in tuple(PRESETS):
            raise ValueError(f"preset={self.preset!r} is not one of {', '.join(PRESETS)}")
        if self.compile not in COMPILE_MODES:
            raise ValueError(f"compile={self.compile!r} is not one of {', '.join(COMPILE_MODES)}")
        expected = {"vision_key", "vision_value", "text_key", "text_value"}
        if (
            not isinstance(self.ranks, dict)
            or set(self.ranks) != expected
            or not all(_are_ranks(ranks) for ranks in self.ranks.values())
        ):
            raise ValueError(
                f"ranks={self.ranks!r} must give a positive integer, or a list with one per packed layer, for each of "
                f"{', '.join(sorted(expected))}"
            )
        if not isinstance(self.tail_slots, int) or self.tail_slots < MIN_TAIL_SLOTS:
            raise ValueError(f"tail_slots={self.tail_slots!r} must be an integer >= {MIN_TAIL_SLOTS}")
        if self.head_groups is not None and (not _is_count(self.head_groups) or self.head_groups < 1):
            raise ValueError(f"head_groups={self.head_groups!r} must be an integer >= 1, or None")
        if self.key_block is not None and not _is_count(self.key_block):
            raise ValueError(f"key_block={self.key_block!r} must be an integer >= 0, or None")
        if self.prefer not in PREFERENCES:
            raise ValueError(f"prefer={self.prefer!r} is not one of {', '.join(PREFERENCES)}")
        if self.planned_device is not None and self.planned_device not in OF_TYPE:
            raise ValueError(f"planned_device={self.planned_device!r} is not one of {', '.join(OF_TYPE)}, or None")
        if not isinstance(self.coarse, (list, tuple)) or not all(name in ("text", "vision") for name in self.coarse):
            raise ValueError(f'coarse={self.coarse!r} must hold "text", "vision", both or none')
        object.__setattr__(self, "coarse", tuple(self.coarse))
        for name, options in OPTION_FIELDS.items():
            if not isinstance(getattr(self, name), options):
                raise ValueError(f"{name}={getattr(self, name)!r} must be {options.__name__}")
        self._check_options()
        if self.quantize is not None and not isinstance(self.quantize, str):
            raise ValueError(
                f"quantize={self.quantize!r}: a config holds the short name; pass torchao objects to optimize"
            )
        if self.min_tokens is not None and not _is_count(self.min_tokens):
            raise ValueError(f"min_tokens={self.min_tokens!r} must be an integer >= 0, or None")
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r} must be True or False")

    def _check_options(self) -> None:
        if self.options is None:
            return
        if self.preset is None:
            raise ValueError(f"options={self.options!r} are those of a preset; pass preset too")
        if type(self.options) is not PRESETS[self.preset]:
            raise ValueError(
                f"options={self.options!r} must be {PRESETS[self.preset].__name__} with preset={self.preset!r}"
            )
        own = OPTION_FIELDS.get(self._option_field)
        if own and getattr(self, self._option_field) != own():
            raise ValueError(f"options and {self._option_field} exclude each other; pass one of them")

    @property
    def _option_field(self) -> str:
        return (self.preset or "").replace("-", "_")

    @property
    def preset_options(self) -> Preset:
        """The options of the preset."""
        if self.options is not None:
            return self.options
        if self._option_field in OPTION_FIELDS:
            return getattr(self, self._option_field)
        return PRESETS[self.preset or ""]()

    def wanted(self, layers: Sequence[int], window: int | None, can_be_packed: Sequence[int]) -> Layers:
        """Some layers, all of those with a window, as a preset's plan is asked for them."""
        return Layers(layers, window, can_be_packed, self.ranks, self.tail_slots)

    def to_json(self) -> str:
        """This configuration as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "AttentionPackConfig":
        """A configuration from JSON; raises ValueError for anything that is not one."""
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            raise ValueError(f"a configuration is an object with {', '.join(sorted(known))}; got {values!r}")
        of_preset = {"options": PRESETS.get(str(values.get("preset")), Preset)}
        for name, options in (OPTION_FIELDS | of_preset).items():
            if values.get(name) is not None:
                given, allowed = values[name], {f.name for f in fields(options)}
                if not isinstance(given, dict) or set(given) - allowed:
                    raise ValueError(f"{name} is an object with {', '.join(sorted(allowed))}; got {given!r}")
                values[name] = options(**given)
        return cls(**values)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _are_ranks(ranks: object) -> bool:
    every = ranks if isinstance(ranks, list) and ranks else [ranks]
    return all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in every)
