"""Plans: how every stream is stored."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.plan.coarse_rule import CoarseRule
from apack_compile.plan.ranks import ALONE, Ranks
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.tiers import TierRule

MODALITIES = ("vision", "text")
STREAMS = ("key", "value")
# Packed segments, in the operations' order.
SEGMENTS = ("coarse", *MODALITIES)
FIRST_TOKENS = 4
# Scopes whose bases are fitted to what a cache holds, and stored with it.
FITTED_SCOPES = ("sequence", "batch")
# What bases of all requests are stored in; a CPU reads the first fastest (docs/notes/performance.md).
BASIS_DTYPES = (torch.float32, torch.float16)
# Newest tokens that stay dense at least where bases are fitted to each cache.
MIN_TAIL_SLOTS = 32


@dataclass(frozen=True)
class StreamPlan:
    """How one stream of one modality is stored.

    scope: "as_is" (untransformed, model dtype), "half" (untransformed, 16 bits), "sequence" (a basis per sequence), "batch"
    (one for all rows of a batch) or "model" (one for all requests). expected_error: share of a stream's variance that
    coding loses on the calibration's tokens.
    """

    scope: str
    bands: Bands = field(default_factory=Bands)
    token_scale: bool = False
    expected_error: float = 0.0


@dataclass(frozen=True)
class LayerPlan:
    """The streams of a layer; coarse ones where a rule tells coarse tokens from fine ones."""

    vision_key: StreamPlan
    vision_value: StreamPlan
    text_key: StreamPlan
    text_value: StreamPlan
    coarse_key: StreamPlan | None = None
    coarse_value: StreamPlan | None = None

    @property
    def named(self) -> dict[str, StreamPlan]:
        """The streams by name, in the operations' order: coarse K and V if there are any, vision K, vision V, text K, text V."""
        names = [f"{segment}_{stream}" for segment in SEGMENTS for stream in STREAMS]
        return {name: stream for name in names if (stream := getattr(self, name)) is not None}

    @property
    def streams(self) -> tuple[StreamPlan, ...]:
        """The streams, in the operations' order."""
        return tuple(self.named.values())

    def pair(self, segment: str) -> tuple[StreamPlan, StreamPlan]:
        """Key and value of a packed segment."""
        return getattr(self, f"{segment}_key"), getattr(self, f"{segment}_value")


@dataclass(frozen=True)
class Provenance:
    """Where a plan comes from: what its bases were calibrated on, the versions that made it, the file it was loaded from.

    plan_id: the same for the parts of one plan on all ranks of tensor parallelism, another for every other plan; None for one rank.
    """

    calibrated_on: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None
    plan_id: str | None = None


@dataclass(frozen=True)
class Plan:
    """A plan for one cache, with the model-scoped bases it needs.

    layers: plan of each packed layer, by its index in the model. tail_slots: newest tokens kept dense. first_tokens: tokens
    at the start kept dense. groups: head groups. bases: of the streams of each model-scoped layer, in their order.
    signature: layers, KV heads, head_dim and dtype of the model it is for. tiers: what a step reads; None for all. rotation: how packed
    keys were rotated back; None for keys stored as they come. coarse: which tokens the coarse segment holds; None for none.
    ranks: of tensor parallelism, which it was made on; the signature's KV heads are that rank's. window: newest tokens that a
    query of these layers sees, itself included; None for all, or where a file of an earlier format does not say. windows: plans of
    the layers with other windows, by window.
    """

    layers: Mapping[int, LayerPlan]
    tail_slots: int
    first_tokens: int = FIRST_TOKENS
    groups: int = 1
    bases: Mapping[int, tuple[StreamBasis, ...]] = field(default_factory=dict, repr=False)
    separates_vision: bool = True
    signature: tuple = ()
    provenance: Provenance = Provenance()
    tiers: TierRule | None = None
    rotation: KeyRotation | None = None
    coarse: CoarseRule | None = None
    ranks: Ranks = ALONE
    window: int | None = None
    windows: Mapping[int, "Plan"] = field(default_factory=dict)

    @property
    def by_window(self) -> dict[int | None, "Plan"]:
        """This plan and those of the layers with other windows."""
        return {self.window: self, **self.windows}

    @property
    def every_layer(self) -> list[int]:
        """The layers of all windows, in order."""
        return sorted(layer for part in self.by_window.values() for layer in part.layers)

    def of_layer(self, layer: int) -> "Plan":
        """The plan that has a layer."""
        return next(part for part in self.by_window.values() if layer in part.layers)

    @property
    def segments(self) -> tuple[str, ...]:
        """The packed segments, in the operations' order."""
        return SEGMENTS if self.coarse is not None else MODALITIES

    def shares(self, vision_share: float) -> dict[str, float]:
        """Share of a prompt's tokens that each packed segment holds, of so many vision tokens, in the segments' order."""
        vision = vision_share if self.separates_vision else 0.0
        held = {"vision": vision, "text": 1 - vision}
        if self.coarse is not None:
            coarse = held[self.coarse.modality] * self.coarse.share
            held[self.coarse.modality] -= coarse
            held["coarse"] = coarse
        return {segment: held[segment] for segment in self.segments}

    @property
    def has_coordinates(self) -> bool:
        """Whether packed keys rotate by several coordinates of a token, which a cache must be shown."""
        return self.rotation is not None and self.rotation.coordinates is not None

    @property
    def layers_place_tokens(self) -> bool:
        """Whether each layer has positions of its own, because it orders, evicts or separates tokens by itself."""
        return self.tiers is not None or self.coarse is not None

    @property
    def per_request(self) -> bool:
        """Whether bases are fitted to the tokens of each cache."""
        return any(stream.scope in FITTED_SCOPES for layer in self.layers.values() for stream in layer.streams)

    def save(self, path: str | os.PathLike) -> None:
        """Write this plan to one file, whole or not at all; raises ValueError for a plan that no cache can use.

        Under tensor parallelism every rank saves its plan to the same file, which then holds those of all; parts of another plan in it
        go. Between two plans, wait until all ranks have saved the first.
        """
        from apack_compile.plan.file import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """The plan of a file; raises OSError where it cannot be read, and ValueError for a file that does not hold a whole, usable plan."""
        from apack_compile.plan.file import load_plan

        return load_plan(path)

    def to(self, device: torch.device) -> "Plan":
        """This plan with its bases on a device."""
        distinct = {id(basis): basis for bases in self.bases.values() for basis in bases}
        there = {key: StreamBasis(*(t.to(device) for t in basis)) for key, basis in distinct.items()}
        moved = {i: tuple(there[id(basis)] for basis in bases) for i, bases in self.bases.items()}
        rotation = None if self.rotation is None else self.rotation.to(device)
        coarse = None if self.coarse is None else self.coarse.to(device)
        windows = {window: part.to(device) for window, part in self.windows.items()}
        return replace(self, bases=moved, rotation=rotation, coarse=coarse, windows=windows)


def uniform_plan(layers: Sequence[int], streams: LayerPlan, tail_slots: int) -> Plan:
    """The same streams in every layer."""
    return Plan(dict.fromkeys(layers, streams), tail_slots)
