"""Statistics of a model's keys and values, from passes over calibration inputs."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apack_compile.calibration.sensitivity import Observation, observe
from apack_compile.checks import counted
from apack_compile.kernels.autocast import without_autocast
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.rotations import rotated
from apack_compile.models.coordinates import TokenCoordinates, coordinates_of
from apack_compile.models.modality import compact, padding_of, vision_of
from apack_compile.plan.basis import Moments, Spectrum, fit, fit_steps, mixed
from apack_compile.plan.budget import StreamStatistics
from apack_compile.plan.coarse_rule import (
    COARSE_SHARE,
    NEWEST,
    CoarseRule,
    RunningImportance,
    features,
    least_important,
    scores_of,
    unrotated,
)
from apack_compile.plan.plan import FIRST_TOKENS, MODALITIES
from apack_compile.plan.rotation import KeyRotation, deinterleaved_keys, rotary_start
from apack_compile.plan.source import Statistics

# Steps are fitted to these: with 512 the tails were missed, and clipping there cost more than all else (docs/notes/quality.md).
SAMPLE_TOKENS = 2_048
# Gradients know a stream's sensitivity roughly, and large disturbances do not cost what small ones promise: its total counts with
# this power (docs/notes/quality.md).
SENSITIVITY_POWER = 0.5
# The sensitivity of single components is drawn towards their mean as if this many queries had seen them all alike.
PRIOR_QUERIES = 32

# How keys rotate: in all layers alike, or in each by itself.
Rotations = KeyRotation | None | Mapping[int, KeyRotation | None]


@dataclass
class RunningMoments:
    """Sums over tokens `[G, N, W_g]`, taken around the first batch's mean, and an even sample of the tokens."""

    count: int = 0
    center: Tensor | None = None
    total: Tensor | None = None
    gram: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)
    sensitivity: Tensor | None = None
    gradients: int = 0
    queries: int = 0

    def add(self, x: Tensor) -> None:
        """Add tokens."""
        x = x.float()
        if self.center is None:
            self.center = x.mean(1)
            self.total = torch.zeros_like(self.center)
            self.gram = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
        shifted = x - self.center[:, None]
        self.count += x.shape[1]
        self.total += shifted.sum(1)
        self.gram += shifted.mT @ shifted
        self.sample.append(x[:, :: max(x.shape[1] // SAMPLE_TOKENS, 1)])

    def add_gradients(self, gradients: Tensor, queries: int) -> None:
        """Add gradients `[G, N, W_g]` of `queries` next tokens with respect to N tokens."""
        moment = gradients.float().mT @ gradients.float()
        self.sensitivity = moment if self.sensitivity is None else self.sensitivity + moment
        self.gradients += gradients.shape[1]
        self.queries += queries

    def finish(self) -> Moments:
        """Moments with a leading dimension of 1 (one basis for all sequences)."""
        shift = self.total / self.count
        covariance = self.gram / self.count - shift[:, :, None] * shift[:, None]
        count = torch.full((1, len(shift)), self.count, device=shift.device)
        return Moments(count, (self.center + shift)[None], covariance[None])


class Collected(NamedTuple):
    """What calibration inputs tell; without_gradients: why all components of a stream count alike; None where gradients were seen."""

    statistics: Statistics
    rules: Mapping[str, CoarseRule]
    without_gradients: str | None


StreamKey = tuple[int, str, int]
Running = dict[StreamKey, RunningMoments]


class Observations:
    """What a model does with calibration inputs (dictionaries with at least `input_ids`), keys as a packed cache has them.

    Iterating gives each input and its observation. One takes the memory of a few dense caches: only that of a single input is kept.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Iterable[int],
        inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        rotation: Rotations = None,
    ) -> None:
        self.model, self.layers, self.rotation = model, list(layers), rotation
        self.batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        self._first: Observation | None = None

    @property
    def first(self) -> Observation:
        """That of the first input."""
        if self._first is None:
            self._first = self._observe(self.batches[0])
        return self._first

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any], Observation]]:
        for i, batch in enumerate(self.batches):
            seen = self._observe(batch) if i else self.first
            if len(self.batches) > 1:
                self._first = None
            yield batch, seen

    def _observe(self, batch: Mapping[str, Any]) -> Observation:
        return as_packed(observe(self.model, batch, self.layers), self.rotation)


def collect(
    observations: Observations,
    groups: int = 1,
    coarse: Collection[str] = ("text",),
    ranked: Collection[int] | None = None,
) -> Collected:
    """Statistics of the layers that were observed, for so many head groups, keys rotated back; coarse rules.

    By modality and, of the `coarse` modalities whose tokens' importance the gradients tell, of coarse and of fine tokens by the
    modality's rule, in the layers that are `ranked` (None for all). Raises ValueError when no input has a usable token (padding and
    the first tokens are left out).
    """
    config, layers = observations.model.config, observations.layers
    running: Running = {}
    importance: dict[tuple[str, int], RunningImportance] = {}
    reasons: list[str | None] = []
    for batch, seen in observations:
        reasons.append(seen.without_gradients)
        add_observation(running, seen, config, batch, groups)
        add_importance(importance, only_layers(seen, ranked), config, batch, coarse)
    if not running:
        raise ValueError(
            f"inputs: no usable token in {counted(len(reasons), 'calibration input')} (only padding or first tokens)"
        )
    for layer in layers:
        for stream in range(2):
            if (layer, "text", stream) not in running:
                running[layer, "text", stream] = running[layer, "vision", stream]
    rules = rules_of(importance, layers if ranked is None else ranked)
    for batch, seen in observations if rules else ():
        add_observation(running, only_layers(seen, ranked), config, batch, groups, rules)
    return Collected(by_layer(running), rules, None if None in reasons else reasons[0])


def only_layers(seen: Observation, layers: Collection[int] | None) -> Observation:
    """An observation of some of its layers; None for all."""
    if layers is None:
        return seen
    states, gradients = ({i: x for i, x in found.items() if i in layers} for found in (seen.states, seen.gradients))
    return replace(seen, states=states, gradients=gradients)


def as_packed(seen: Observation, rotation: Rotations) -> Observation:
    """An observation with keys, and their gradients, as a packed cache has them."""
    rotations = rotation if isinstance(rotation, Mapping) else dict.fromkeys(seen.states, rotation)
    return replace(
        seen,
        rotations=rotations,
        states={i: (deinterleaved_keys(key, rotations[i]), value) for i, (key, value) in seen.states.items()},
        gradients={
            i: ([deinterleaved_keys(gradient, rotations[i]) for gradient in keys], values)
            for i, (keys, values) in seen.gradients.items()
        },
    )


@without_autocast
def by_layer(running: Running) -> Statistics:
    """Statistics of every layer by segment."""
    statistics: Statistics = {}
    found = finish_all(running)
    for layer, segment, _ in found:
        statistics.setdefault(layer, {})[segment] = (found[layer, segment, 0], found[layer, segment, 1])
    return statistics


@without_autocast
def add_observation(
    running: Running,
    seen: Observation,
    config: Any,
    batch: Mapping[str, Any],
    groups: int,
    rules: Mapping[str, CoarseRule] | None = None,
) -> None:
    """Add one input's states and gradients to the streams of their modality or, with rules, of its coarse and fine tokens."""
    usable = usable_tokens(config, batch, next(iter(seen.states.values()))[0])
    for layer, both in seen.states.items():
        rotation, coordinates = seen.rotations[layer], tokens_at(seen, batch, layer)
        segments = usable if rules is None else separated(rules, layer, seen, usable, coordinates)
        for name, chosen in segments.items():
            if not bool(chosen.any()):
                continue
            rotations = None if rotation is None else rotations_of_tokens(chosen, coordinates, rotation)[:, None]
            for stream, states in enumerate(both):
                moments = running.setdefault((layer, name, stream), RunningMoments())
                moments.add(chosen_tokens(states, chosen, None if stream else rotations, groups))
                for gradient in seen.gradients[layer][stream] if seen.queries else ():
                    known = chosen_tokens(gradient, chosen, None if stream else rotations, groups)
                    moments.add_gradients(known, seen.queries)


def separated(
    rules: Mapping[str, CoarseRule],
    layer: int,
    seen: Observation,
    usable: Mapping[str, Tensor],
    coordinates: Tensor,
) -> dict[str, Tensor]:
    """Coarse and fine tokens of each modality with a rule, bool `[B, T]`, among the usable ones."""
    segments: dict[str, Tensor] = {}
    column = torch.arange(coordinates.shape[1], device=coordinates.device)
    older = column < len(column) - seen.queries - NEWEST
    for modality, rule in rules.items():
        scores = scores_of(*seen.states[layer], coordinates, seen.rotations[layer], rule.weights[layer])
        coarse = least_important(usable[modality] & older, scores, rule.share)
        segments |= {f"coarse_{modality}": coarse, f"fine_{modality}": usable[modality] & ~coarse}
    return segments


@without_autocast
def add_importance(
    importance: dict[tuple[str, int], RunningImportance],
    seen: Observation,
    config: Any,
    batch: Mapping[str, Any],
    coarse: Collection[str],
) -> None:
    """Add one input's tokens of the `coarse` modalities, and how much disturbing each of them costs, by modality and layer."""
    for layer, both in seen.gradients.items() if coarse else ():
        key, value = seen.states[layer]
        usable = {name: flags for name, flags in usable_tokens(config, batch, key).items() if name in coarse}
        x = features(unrotated(key, tokens_at(seen, batch, layer), seen.rotations[layer]), value)
        energy = sum(
            gradient.double().square().sum((1, 3)) * float(states.float().var())
            for states, drawn in zip((key, value), both, strict=True)
            for gradient in drawn
        )
        for modality, flags in usable.items():
            older = flags[:, : max(energy.shape[1] - NEWEST, 0)]
            known = importance.setdefault((modality, layer), RunningImportance())
            known.add(x[:, : older.shape[1]][older], energy[:, : older.shape[1]][older])


@without_autocast
def rules_of(importance: Mapping[tuple[str, int], RunningImportance], layers: Iterable[int]) -> dict[str, CoarseRule]:
    """The rule of each modality of which every layer saw enough tokens."""
    rules = {}
    for modality in MODALITIES:
        found = {layer: importance[modality, layer] for layer in layers if (modality, layer) in importance}
        if found and all(known.is_known for known in found.values()):
            rules[modality] = CoarseRule(
                modality, COARSE_SHARE, {layer: known.finish() for layer, known in found.items()}
            )
    return rules


def chosen_tokens(states: Tensor, chosen: Tensor, rotations: Tensor | None, groups: int) -> Tensor:
    """The chosen tokens `[G, N, W_g]` of states `[B, H_kv, T, D]`, rotated back; states may end before the flags `[B, T]`."""
    tokens = states.shape[2]
    still = states if rotations is None else rotated(states, rotations[:, :, :tokens], back=True)
    return to_groups(still, groups).transpose(0, 1)[:, chosen[:, :tokens]]


def tokens_at(seen: Observation, batch: Mapping[str, Any], layer: int) -> Tensor:
    """Coordinates `[B, T, C]` of an input's tokens, by which a layer's keys rotate.

    Raises ValueError where keys rotate by several and they were not seen.
    """
    keys, rotation = seen.states[layer][0], seen.rotations[layer]
    rows, tokens = keys.shape[0], keys.shape[2]
    if rotation is not None and rotation.coordinates is not None:
        found = coordinates_of(seen.positions, rows, tokens, rotation.coordinate_count)
        if found is None:
            raise ValueError("inputs: the model did not give its rotary embedding the positions of every token")
        return found
    padding = padding_of(batch, tokens)
    none = torch.zeros(rows, 1, dtype=torch.int64, device=keys.device)
    start = none if padding is None else rotary_start(padding)
    return TokenCoordinates.starting_at(start).at(torch.arange(tokens, device=keys.device).expand(rows, -1))


def rotations_of_tokens(flags: Tensor, coordinates: Tensor, rotation: KeyRotation) -> Tensor:
    """Rotations `[B, T, 2, P]` of the tokens that are flagged `[B, T]`, stored in order; anything for the others."""
    slot = (flags.cumsum(1) - 1).clamp_min(0)
    anchors = compact(flags).gather(1, slot // rotation.block * rotation.block).clamp_min(0)
    return rotation.at(coordinates.gather(1, anchors[..., None].expand(-1, -1, coordinates.shape[-1])))


def finish_all(running: Running) -> dict[StreamKey, StreamStatistics]:
    """Statistics of every stream; one whose sensitivity was not seen counts as much as the others do on average."""
    spectra = {key: finish_spectrum(moments) for key, moments in running.items()}
    harms = {key: harm(spectra[key], moments) for key, moments in running.items()}
    known = [math.log(float(found.sum())) for found in harms.values() if found is not None]
    typical = math.exp(sum(known) / len(known)) if known else 1.0
    finished = {}
    for key, spectrum in spectra.items():
        variance, found = spectrum.deviation[0].square(), harms[key]
        finished[key] = StreamStatistics(spectrum, typical * variance / variance.sum() if found is None else found)
    return finished


def usable_tokens(config: Any, batch: Mapping[str, Any], keys: Tensor) -> dict[str, Tensor]:
    """Bool `[B, T]` per modality: its tokens, without padding and each row's first tokens."""
    rows, tokens = keys.shape[0], keys.shape[2]
    none = torch.zeros(rows, tokens, dtype=torch.bool, device=keys.device)
    padding = padding_of(batch, tokens)
    vision = vision_of(config, batch)
    vision = none if vision is None or vision.shape != none.shape else vision
    real = ~(none if padding is None else padding)
    usable = real & (real.cumsum(1) > FIRST_TOKENS)
    return {"vision": usable & vision, "text": usable & ~vision}


def harm(spectrum: Spectrum, running: RunningMoments) -> Tensor | None:
    """Harm `[G, r]` of dropping each component: sensitivity times variance, the total damped; None if nothing read the stream."""
    if running.sensitivity is None or not bool(running.sensitivity.any()):
        return None
    rows = spectrum.rows[0]
    sensed = torch.einsum("grv,gvw,grw->gr", rows, running.sensitivity / running.gradients, rows)
    prior = PRIOR_QUERIES / (PRIOR_QUERIES + running.queries)
    found = ((1 - prior) * sensed + prior * sensed.mean()) * spectrum.deviation[0].square()
    return found * found.sum() ** (SENSITIVITY_POWER - 1)


def finish_spectrum(running: RunningMoments) -> Spectrum:
    """Spectrum of a stream, with steps that serve an even sample of its tokens best."""
    sample = torch.cat(running.sample, dim=1)
    sample = sample[:, :: max(sample.shape[1] // SAMPLE_TOKENS, 1)]
    return fit_steps(mixed(fit(running.finish())), sample[None], token_scale=True)
