"""Statistics of a model's keys and values, from passes over calibration inputs."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apack_compile.calibration.host_memory import give_back
from apack_compile.calibration.sensitivity import Observation, draw_gradients, observe
from apack_compile.calibration.streams import (
    PRIOR_TOKENS,
    SAMPLE_TOKENS,
    SMALL_SAMPLE,
    Running,
    RunningMoments,
    TokenSample,
    by_layer,
    fitted,
)
from apack_compile.checks import counted
from apack_compile.kernels.autocast import without_autocast
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.rotations import rotated
from apack_compile.models.coordinates import TokenCoordinates, coordinates_of
from apack_compile.models.modality import compact, padding_of, vision_of
from apack_compile.plan.coarse_rule import (
    COARSE_SHARE,
    NEWEST,
    TOKENS_A_WEIGHT,
    CoarseRule,
    RunningImportance,
    feature_count,
    features,
    least_important,
    scores_of,
    unrotated,
)
from apack_compile.plan.plan import FIRST_TOKENS, MODALITIES
from apack_compile.plan.rotation import KeyRotation, deinterleaved_keys, rotary_start
from apack_compile.plan.source import Statistics

# Tokens of a row are added so many at a time: copies of them as the sums need them are small.
COLUMNS_AT_ONCE = 512

# How keys rotate: in all layers alike, or in each by itself.
Rotations = KeyRotation | None | Mapping[int, KeyRotation | None]
Importance = dict[tuple[str, int], RunningImportance]


class Collected(NamedTuple):
    """What calibration inputs tell; without_gradients: why all components of a stream count alike; None where gradients were seen."""

    statistics: Statistics
    rules: Mapping[str, CoarseRule]
    without_gradients: str | None


class Observations:
    """What a model does with calibration inputs (dictionaries with at least `input_ids`), keys as a packed cache has them.

    Iterating gives each input and its observation. One takes the memory of a dense cache: only that of a single input is kept.
    first: that of the first input, where it was seen already.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Iterable[int],
        inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        rotation: Rotations = None,
        first: Observation | None = None,
    ) -> None:
        self.model, self.layers, self.rotation = model, list(layers), rotation
        self.batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        self._first = None if first is None else as_packed(first, rotation)

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
            # before the next one is made
            del seen

    def _observe(self, batch: Mapping[str, Any]) -> Observation:
        give_back()
        seen = observe(self.model, batch, self.layers)
        give_back()
        return as_packed(seen, self.rotation)


def as_packed(seen: Observation, rotation: Rotations) -> Observation:
    """An observation whose keys rotate back so."""
    each = rotation if isinstance(rotation, Mapping) else dict.fromkeys(seen.states, rotation)
    return replace(seen, rotations=each)


@torch.inference_mode(False)
@torch.no_grad()
def collect(
    observations: Observations,
    groups: int = 1,
    coarse: Collection[str] = ("text",),
    ranked: Collection[int] | None = None,
    advance: Callable[[], Any] = lambda: None,
    sample: int = SAMPLE_TOKENS,
) -> Collected:
    """Statistics of the layers that were observed, for so many head groups, keys rotated back; coarse rules.

    By modality and, of the `coarse` modalities whose tokens' importance the gradients tell, of coarse and of fine tokens by the
    modality's rule, in the layers that are `ranked` (None for all). advance: called for each layer of an input, and when its bases are
    fitted. sample: tokens of a stream that its steps are fitted to. Raises ValueError when no input has a usable token (padding and
    the first tokens are left out).
    """
    config, layers = observations.model.config, observations.layers
    ranked = layers if ranked is None else ranked
    running: Running = {}
    importance: Importance = {}
    reasons: list[str | None] = []
    for batch, seen in observations:
        energy: dict[int, Tensor] | None = {} if coarse else None
        reasons.append(add_observation(running, seen, config, batch, groups, sample, advance, energy=energy))
        if energy is not None and reasons[-1] is None:
            add_importance(importance, only_layers(seen, ranked), config, batch, energy, coarse)
        del seen
    if not running:
        raise ValueError(
            f"inputs: no usable token in {counted(len(reasons), 'calibration input')} (only padding or first tokens)"
        )
    if None not in reasons:
        # the backward pass may have come to some layers
        for moments in running.values():
            moments.forget_gradients()
    for layer, stream in product(layers, range(2)):
        text, vision = (running.get((layer, name, stream)) for name in ("text", "vision"))
        if text is not None and vision is not None:
            text.draw_towards(vision, PRIOR_TOKENS)
    found = fitted(running, advance)
    for layer, stream in product(layers, range(2)):
        if (layer, "text", stream) not in found:
            found[layer, "text", stream] = found[layer, "vision", stream]
    rules = rules_of(importance, ranked)
    importance.clear()
    for batch, seen in observations if rules else ():
        add_observation(running, only_layers(seen, ranked), config, batch, groups, SMALL_SAMPLE, advance, rules)
        del seen
    return Collected(by_layer(found | fitted(running, advance)), rules, None if None in reasons else reasons[0])


def collect_by_layer(
    observations: Observations,
    groups: int,
    coarse: Collection[str],
    ranked: Collection[int],
    advance: Callable[[], Any] = lambda: None,
) -> Collected:
    """The same of one input whose gradients can be had for each layer by itself: sums of one layer at a time."""
    found: list[Collected] = []
    for layer in observations.layers:
        one = Observations(
            observations.model,
            [layer],
            observations.batches,
            observations.rotation,
            only_layers(observations.first, [layer]),
        )
        is_ranked = layer in ranked and enough_tokens(*observations.first.states[layer])
        ranked_here = [layer] if is_ranked else []
        found.append(collect(one, groups, coarse if is_ranked else (), ranked_here, advance, SMALL_SAMPLE))
    told: list[Mapping[str, CoarseRule]] = [
        each.rules for layer, each in zip(observations.layers, found, strict=True) if layer in ranked
    ]
    rules = {
        modality: replace(rule, weights={i: w for rules in told for i, w in rules[modality].weights.items()})
        for modality, rule in (told[0] if told else {}).items()
        if all(modality in rules for rules in told)
    }
    reasons = [each.without_gradients for each in found]
    statistics = {layer: streams for each in found for layer, streams in each.statistics.items()}
    return Collected(statistics, rules, None if None in reasons else reasons[0])


def enough_tokens(key: Tensor, value: Tensor) -> bool:
    """Whether tokens `[B, H_kv, T, D]` can be enough to tell which of them matter."""
    rows, heads, tokens, head_dim = key.shape
    return rows * tokens >= TOKENS_A_WEIGHT * feature_count(heads, head_dim, value.shape[3])


def only_layers(seen: Observation, layers: Collection[int]) -> Observation:
    """An observation of some of its layers."""
    return replace(seen, states={i: states for i, states in seen.states.items() if i in layers})


@without_autocast
def add_observation(
    running: Running,
    seen: Observation,
    config: Any,
    batch: Mapping[str, Any],
    groups: int,
    sample: int = SAMPLE_TOKENS,
    advance: Callable[[], Any] = lambda: None,
    rules: Mapping[str, CoarseRule] | None = None,
    energy: dict[int, Tensor] | None = None,
) -> str | None:
    """Add one input's states and gradients to the streams of their modality or, with rules, of its coarse and fine tokens.

    energy: gets what disturbing each token costs `[B, T]`, by layer. Gives why there are no gradients, or None.
    """
    usable = usable_tokens(config, batch, next(iter(seen.states.values()))[0])
    segments = {layer: segments_of(seen, batch, layer, usable, rules) for layer in seen.states}
    variance = {
        layer: [float(x.float().var()) for x in both] for layer, both in seen.states.items() if energy is not None
    }

    def streams_of(layer: int, stream: int, states: Tensor) -> Iterator[tuple[RunningMoments, Iterator[Tensor]]]:
        rotation = None if stream else seen.rotations[layer]
        for name, chosen in segments[layer].items():
            rotations = None
            if rotation is not None:
                rotations = rotations_of_tokens(chosen, tokens_at(seen, batch, layer), rotation)[:, None]
            moments = running.setdefault((layer, name, stream), RunningMoments(sample=TokenSample(sample)))
            yield moments, chosen_tokens(deinterleaved_keys(states, rotation), chosen, rotations, groups)

    def receive(layer: int, stream: int, gradient: Tensor) -> None:
        for moments, parts in streams_of(layer, stream, gradient):
            for part in parts:
                moments.add_gradients(part)
            moments.queries += seen.queries
        if energy is not None:
            found = gradient.float().square().sum((1, 3)).double() * variance[layer][stream]
            energy[layer] = energy.get(layer, 0) + found

    for layer, both in seen.states.items():
        for stream, states in enumerate(both):
            for moments, parts in streams_of(layer, stream, states):
                for part in parts:
                    moments.add(part)
        advance()
    return draw_gradients(seen, receive)


def segments_of(
    seen: Observation,
    batch: Mapping[str, Any],
    layer: int,
    usable: Mapping[str, Tensor],
    rules: Mapping[str, CoarseRule] | None,
) -> dict[str, Tensor]:
    """The tokens of a layer's segments, bool `[B, T]`, where there are any."""
    found = usable if rules is None else separated(rules, layer, seen, usable, tokens_at(seen, batch, layer))
    return {name: chosen for name, chosen in found.items() if bool(chosen.any())}


def packed_states(seen: Observation, layer: int) -> tuple[Tensor, Tensor]:
    """K and V of a layer as a packed cache has them."""
    key, value = seen.states[layer]
    return deinterleaved_keys(key, seen.rotations[layer]), value


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
        scores = scores_of(*packed_states(seen, layer), coordinates, seen.rotations[layer], rule.weights[layer])
        coarse = least_important(usable[modality] & older, scores, rule.share)
        segments |= {f"coarse_{modality}": coarse, f"fine_{modality}": usable[modality] & ~coarse}
    return segments


@without_autocast
def add_importance(
    importance: Importance,
    seen: Observation,
    config: Any,
    batch: Mapping[str, Any],
    energy: Mapping[int, Tensor],
    coarse: Collection[str],
) -> None:
    """Add one input's tokens of the `coarse` modalities, and what disturbing each of them costs `[B, T]`, by modality and layer."""
    for layer in seen.states:
        key, value = packed_states(seen, layer)
        usable = {name: flags for name, flags in usable_tokens(config, batch, key).items() if name in coarse}
        coordinates, end = tokens_at(seen, batch, layer), max(key.shape[2] - seen.queries - NEWEST, 0)
        for start in range(0, end, COLUMNS_AT_ONCE):
            at = slice(start, min(start + COLUMNS_AT_ONCE, end))
            x = features(unrotated(key[:, :, at], coordinates[:, at], seen.rotations[layer]), value[:, :, at])
            for modality, flags in usable.items():
                chosen = flags[:, at]
                known = importance.setdefault((modality, layer), RunningImportance())
                known.add(x[chosen], energy[layer][:, at][chosen])


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


def chosen_tokens(states: Tensor, chosen: Tensor, rotations: Tensor | None, groups: int) -> Iterator[Tensor]:
    """The chosen tokens of states `[B, H_kv, T, D]`, rotated back, in parts `[G, N, W_g]`; states may end before the flags `[B, T]`."""
    for start in range(0, states.shape[2], COLUMNS_AT_ONCE):
        part = states[:, :, start : start + COLUMNS_AT_ONCE]
        at = slice(start, start + part.shape[2])
        still = part if rotations is None else rotated(part, rotations[:, :, at], back=True)
        tokens = to_groups(still, groups).transpose(0, 1)[:, chosen[:, at]]
        if tokens.shape[1]:
            yield tokens


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
