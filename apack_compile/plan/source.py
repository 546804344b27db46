"""Where the plan of a prompt comes from: a plan that was given, a preset's, or calibrated statistics."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from apack_compile.plan.budget import StreamStatistics, budget_key, budget_plan
from apack_compile.plan.choice import Groups, Weights
from apack_compile.plan.coarse_rule import CoarseRule, tells_apart
from apack_compile.plan.file import versions
from apack_compile.plan.plan import Plan, Provenance
from apack_compile.plan.ranks import ALONE, Ranks
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.time_model import is_aligned

# Of each layer and segment, the key's and the value's.
Statistics = dict[int, dict[str, tuple[StreamStatistics, StreamStatistics]]]


# What says how much components matter: gradients of a calibration, or what a first request's newest tokens attend to.
GRADIENTS = "gradients"
NEWEST_ATTENTION = "the attention of its newest tokens; calibrate(model, inputs) weighs by gradients, which lose less"


@dataclass(frozen=True)
class Calibration:
    """What the inputs of a calibration tell of a model.

    rules: which tokens are coarse, by modality; ranked: modalities that a rule was looked for in. rotations, rotation_reasons:
    how keys rotate and why, by window. inputs: what it was calibrated on; identity: the same on all ranks of tensor
    parallelism. weight_bytes, adapters: of the model then. without_gradients: why all components of a stream count alike;
    None where gradients were seen. weighed_by: what says how much components matter.
    """

    statistics: Statistics
    rules: Mapping[str, CoarseRule]
    ranked: tuple[str, ...]
    rotations: Mapping[int | None, KeyRotation | None]
    rotation_reasons: Mapping[int | None, str]
    groups: Groups
    weight_bytes: int
    key_block: int
    inputs: str
    identity: str | None
    adapters: tuple
    without_gradients: str | None
    weighed_by: str = GRADIENTS


@dataclass(frozen=True)
class PlanSource:
    """Gives every prompt its plan: `given`, else that of `presets` by window, else one made of the calibration for `ratio`.

    layers: the packed ones by window, those that see every token first. signature, device, ranks: of the model. asked: the whole
    configuration, as text. coarse: modalities that may have coarse tokens. planned_device: the type of device that plans are made
    for; None: of `device`. prefer: as the configuration says. made: plans so far, by window and representative prompt.
    """

    given: Plan | None = None
    presets: Mapping[int | None, Plan] = field(default_factory=dict)
    ratio: float | None = None
    coarse: tuple[str, ...] = ()
    calibration: Calibration | None = None
    layers: Mapping[int | None, list[int]] = field(default_factory=dict)
    signature: tuple = ()
    device: torch.device | None = None
    ranks: Ranks = ALONE
    asked: str = ""
    planned_device: str | None = None
    prefer: str = "balanced"
    made: dict[tuple, Plan] = field(default_factory=dict)

    @property
    def needs_calibration(self) -> bool:
        """Whether plans need statistics that are not there."""
        return self.ratio is not None and self.calibration is None

    @property
    def needs_coordinates(self) -> bool:
        """Whether keys of some layers rotate by several coordinates of a token, which a cache must be shown."""
        rotations = [] if self.calibration is None else self.calibration.rotations.values()
        if self.given is not None:
            rotations = [part.rotation for part in self.given.by_window.values()]
        return any(rotation is not None and rotation.coordinates is not None for rotation in rotations)

    def of_model(self, signature: tuple, device: torch.device) -> "PlanSource":
        """This source for a model with another dtype, or on another device."""
        given = None if self.given is None else self.given.to(device)
        return replace(self, given=given, signature=signature, device=device, made={})

    def calibrated(self, calibration: Calibration) -> "PlanSource":
        """This source with another calibration."""
        return replace(self, calibration=calibration, made={})

    def plan_for(self, tokens: int, vision_share: float, window: int | None = None) -> Plan:
        """The plan for a prompt of so many tokens, this share of them vision, of the layers with this window."""
        if self.given is not None:
            return self.given.by_window.get(window, self.given)
        if self.presets:
            return self._signed(self.presets[window], window)
        if self.calibration is None:
            raise RuntimeError(
                f"ratio={self.ratio:g}: no calibrated statistics yet; call apack_compile.calibrate(model, inputs) first. (A first request "
                "calibrates where the optimized model, or a model inside of it, is called with the cache.)"
            )
        key = budget_key(tokens, vision_share)
        key = key if window is None or tokens < window else (window, key[1])
        if (window, *key) not in self.made:
            # of two threads that make it at once, both take that of the first
            self.made.setdefault((window, *key), self._made(self.calibration, window, key))
        return self.made[window, *key]

    def whole_plan(self, tokens: int, vision_share: float) -> Plan:
        """The plan for a prompt of so many tokens, this share of them vision, with those of the layers of all windows."""
        if self.given is not None:
            return self.given
        first, *others = (self.plan_for(tokens, vision_share, window) for window in self.layers)
        return replace(first, windows={part.window: part for part in others}) if others else first

    def _made(self, calibration: Calibration, window: int | None, key: tuple[int, float]) -> Plan:
        """The plan of a representative prompt, for the layers with a window."""
        asked = self.coarse if window is None and tells_apart(self.ratio, key[0]) else ()
        rules = {modality: rule for modality, rule in calibration.rules.items() if modality in asked}
        statistics = {layer: calibration.statistics[layer] for layer in self.layers[window]}
        # of what all layers may have, by number of layers
        part = len(statistics) / sum(map(len, self.layers.values()))
        aligned = is_aligned(self.planned_device or getattr(self.device, "type", None))
        plan = budget_plan(
            statistics,
            self.ratio,
            *key,
            rotation=calibration.rotations[window],
            rules=rules,
            window=window,
            basis_limit=int(part * Weights(calibration.weight_bytes).limit),
            aligned=aligned,
            whole_tiles=aligned and self.prefer == "speed",
        )
        plan = plan if self.device is None else plan.to(self.device)
        return self._signed(plan, window, calibration, key)

    def _signed(
        self, plan: Plan, window: int | None, calibration: Calibration | None = None, made_for: tuple = ()
    ) -> Plan:
        """A plan that says which model and which of its layers it is for, and where it comes from."""
        plan_id = None
        if self.ranks.count > 1:
            identity = None if self.calibration is None else self.calibration.identity
            which = (identity, self.asked, self.signature[-1], window, *made_for)
            plan_id = hashlib.sha256(repr(which).encode()).hexdigest()[:16]
        provenance = Provenance(None if calibration is None else calibration.inputs, versions(), plan_id=plan_id)
        return replace(plan, signature=self.signature, ranks=self.ranks, window=window, provenance=provenance)
