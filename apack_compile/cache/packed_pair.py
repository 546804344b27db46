"""Keys and values of one kind of packed tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.pack.reference import grouped
from apack_compile.kernels.state import KIND_NAMES, TEXT, PackedStream, layout_words
from apack_compile.plan.plan import FITTED_SCOPES, STREAMS, Plan


@dataclass(frozen=True)
class PackedPair:
    """Both streams of a packed segment; kind: COARSE, VISION or TEXT of kernels/state.py."""

    kind: int
    key: PackedStream
    value: PackedStream

    @property
    def slots(self) -> int:
        """Slots, empty ones included."""
        return self.key.codes.shape[2]

    @property
    def streams(self) -> tuple[PackedStream, PackedStream]:
        """Key, then value."""
        return self.key, self.value

    @property
    def tensors(self) -> list[Tensor]:
        """Codes and token scales."""
        return [x for stream in self.streams for x in stream.tokens]

    def with_stream(self, name: str, stream: PackedStream) -> "PackedPair":
        """The same pair with another key or value."""
        return replace(self, key=stream) if name == "key" else replace(self, value=stream)

    def with_tokens(self, change: Callable[[Tensor], Tensor]) -> "PackedPair":
        """The same pair with codes and token scales changed."""
        return replace(self, key=self.key.with_tokens(change), value=self.value.with_tokens(change))

    def with_more_slots(self, slots: int) -> "PackedPair":
        """The same pair with so many more slots, of zeros."""
        return self.with_tokens(lambda x: torch.cat([x, x.new_zeros((*x.shape[:2], slots, *x.shape[3:]))], dim=2))

    def with_rows(self, change: Callable[[Tensor], Tensor], own_bases: bool) -> "PackedPair":
        """The same pair after a change of the batch; own_bases: of its rows too."""

        def changed(stream: PackedStream) -> PackedStream:
            if own_bases:
                basis = StreamBasis(*(change(x) if x.dim() > 1 else x for x in stream.basis))
                stream = replace(stream, basis=basis)
            return stream.with_tokens(change)

        return replace(self, key=changed(self.key), value=changed(self.value))


@dataclass(frozen=True)
class Coding:
    """How one stream is stored. dtype: of tokens that are kept as they are, None for codes."""

    basis: StreamBasis
    bands: Bands
    is_scaled: bool
    dtype: torch.dtype | None = None

    @staticmethod
    def of(stream: PackedStream) -> "Coding":
        """That of a stream that is stored."""
        return Coding(stream.basis, stream.bands, stream.scale.dim() > 1, stream.codes.dtype if stream.as_is else None)

    def stream_of(self, codes: Tensor, scale: Tensor) -> PackedStream:
        """A stream that is stored so."""
        codes = codes if self.dtype in (None, codes.dtype) else codes.to(self.dtype)
        return PackedStream(codes, scale, self.basis, self.bands)


@dataclass(frozen=True)
class Tokens:
    """Tokens `[B, H_kv, n, D]` of a packed segment, keys deinterleaved, and how they become its slots from `used` on, of `slots`.

    real: bool `[B, n]`, None for all. rotations: of the segment's blocks of `block` slots, None for keys as they come. groups: head groups.
    every: how many tokens apart the sample is that says what coding loses; 0 for none.
    """

    key: Tensor
    value: Tensor
    real: Tensor | None
    rotations: Tensor | None
    block: int
    groups: int
    used: int
    slots: int
    every: int

    def packed(self, kind: int, key: Coding, value: Coding) -> tuple[PackedPair, Tensor]:
        """The pair of these tokens, slots before `used` left empty; what coding K and V loses, `[2]`."""
        rotations = [] if self.rotations is None else [self.rotations]
        block = 0 if self.rotations is None else self.block
        layout = layout_words(block, 0, [(TEXT, (key.bands, value.bands))])
        bases = [*key.basis, *value.basis, *rotations]
        scaled = [key.is_scaled, value.is_scaled]
        given = self.key, self.value, bases, layout, self.groups, scaled, self.used, self.slots, self.every, self.real
        key_codes, key_scale, value_codes, value_scale, lost = torch.ops.apack.pack.default(*given)
        return PackedPair(kind, key.stream_of(key_codes, key_scale), value.stream_of(value_codes, value_scale)), lost

    def grouped(self, name: str) -> Tensor:
        """K or V as head groups `[B, G, n, W_g]`, as their basis codes them."""
        if name == "value":
            return to_groups(self.value, self.groups)
        slots = torch.arange(self.used, self.used + self.key.shape[2], device=self.key.device)
        return grouped(self.key, self.groups, self.rotations, self.block, slots)


def codings(
    plan: Plan, layer: int, segment: str, dense_dtype: torch.dtype, identity: StreamBasis
) -> tuple[Coding, Coding]:
    """How a packed segment of a layer is stored; bases that are fitted to each cache are yet to come."""
    named = plan.layers[layer].named
    found = []
    for name in (f"{segment}_{stream}" for stream in STREAMS):
        planned = named[name]
        if planned.scope == "model":
            basis = plan.bases[layer][list(named).index(name)]
            has_scale = planned.token_scale and planned.bands.components > 0
            found.append(Coding(basis, planned.bands, has_scale))
        else:
            # fitted bases have at most as many components as tokens
            dtype = dense_dtype if planned.scope == "half" else None
            found.append(Coding(identity, planned.bands.at_most(0), False, dtype))
    return found[0], found[1]


def empty_pair(
    kind: int, codings: tuple[Coding, Coding], plan: Plan, layer: int, key: Tensor, value: Tensor
) -> PackedPair:
    """A packed segment of a layer without slots, for states `[B, H_kv, n, D]`."""
    streams = []
    planned = plan.layers[layer].pair(KIND_NAMES[kind])
    for coding, how, states in zip(codings, planned, (key, value), strict=True):
        shape, width = (states.shape[0], plan.groups, 0), states.shape[1] * states.shape[3] // plan.groups
        if how.scope in ("as_is", "half"):
            codes = states.new_empty((*shape, width), dtype=coding.dtype)
        else:
            codes = states.new_empty((*shape, coding.bands.token_bytes), dtype=torch.uint8)
        if how.scope in FITTED_SCOPES:
            coding = replace(
                coding, basis=_basis_of_none(1 if how.scope == "batch" else shape[0], plan.groups, width, codes)
            )
        scale = states.new_empty(shape if coding.is_scaled else 0, dtype=torch.float16)
        streams.append(PackedStream(codes, scale, coding.basis, coding.bands))
    return PackedPair(kind, *streams)


def _basis_of_none(batch: int, groups: int, width: int, like: Tensor) -> StreamBasis:
    """The basis that is fitted to no tokens."""
    mean = like.new_zeros((batch, groups, width), dtype=torch.float16)
    decoder = mean.new_empty((batch, groups, 0, width))
    return StreamBasis(mean, decoder, mean.new_empty((batch, groups, 0), dtype=torch.float32))
