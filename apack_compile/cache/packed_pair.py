"""Keys and values of one kind of packed tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import StreamBasis
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.state import KIND_NAMES, PackedStream
from apack_compile.plan.plan import STREAMS, Plan, StreamPlan


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
        return [x for stream in self.streams for x in (stream.codes, stream.scale)]

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


def empty_pairs(plan: Plan, layer: int, key: Tensor, value: Tensor, dense_dtype: torch.dtype) -> dict[str, PackedPair]:
    """The packed segments of a layer by name, without slots, for states `[B, H_kv, n, D]`."""
    named = plan.layers[layer].named
    bases = dict(zip(named, plan.bases.get(layer, ()), strict=False))

    def stream(segment: str, name: str, states: Tensor) -> PackedStream:
        planned, basis = named[f"{segment}_{name}"], bases.get(f"{segment}_{name}")
        x = to_groups(states[:, :, :0], plan.groups)
        basis = basis if planned.scope == "model" else _basis_to_come(planned, states, plan.groups)
        codes, _ = encode(x, basis, planned.bands)
        codes = codes.to(dense_dtype) if planned.scope == "half" else codes
        scale = x.new_empty((*x.shape[:3],) if planned.token_scale else 0, dtype=torch.float16)
        return PackedStream(codes, scale, basis, planned.bands)

    return {
        segment: PackedPair(
            KIND_NAMES.index(segment),
            *(stream(segment, name, x) for name, x in zip(STREAMS, (key, value), strict=True)),
        )
        for segment in plan.segments
    }


def _basis_to_come(plan: StreamPlan, states: Tensor, groups: int) -> StreamBasis:
    """The basis of a stream that the plan has none for: the identity, or zeros that the first fit replaces."""
    empty = states.new_empty(0, dtype=torch.float32)
    if plan.scope in ("as_is", "half"):
        return StreamBasis(empty, empty, empty)
    batch, width = 1 if plan.scope == "batch" else states.shape[0], states.shape[1] * states.shape[3] // groups
    shape = (batch, groups, plan.bands.components, width)
    half = {"dtype": torch.float16, "device": states.device}
    return StreamBasis(torch.zeros(batch, groups, width, **half), torch.zeros(shape, **half), empty.new_ones(shape[:3]))
