"""Whether the tensors of a prefix fit one another and the model: native code trusts what it is given."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apack_compile.cache.layer import MAX_APPEND
from apack_compile.cache.layer_groups import CAPACITY_GRAIN
from apack_compile.cache.packed_pair import Coding, codings
from apack_compile.cache.prefix_values import GroupValues, LayerValues
from apack_compile.kernels.format import StreamBasis
from apack_compile.kernels.state import KIND_NAMES, PackedState, PackedStream, Segment
from apack_compile.plan.plan import Plan

Wanted = tuple[str, Tensor, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class LayerCheck:
    """A layer's state, and what it must fit: its plan, a prompt of so many tokens, dtypes of the model and of its dense tokens.

    own: the plan of a branch's own tokens.
    """

    group: GroupValues
    layer: LayerValues
    state: PackedState
    plan: Plan
    own: Plan
    tokens: int
    dtype: torch.dtype
    dense_dtype: torch.dtype

    def check(self) -> None:
        """Raise ValueError for a tensor, or a number, that does not fit."""
        self._check_segments()
        self._check_tensors()
        self._check_places()

    def _fail(self, what: str) -> None:
        raise ValueError(f"layer {self.layer.layer}: {what}")

    def _check_segments(self) -> None:
        """Kinds, rotation and bands are those of the plan."""
        state, rotation = self.state, self.plan.rotation
        kinds = [KIND_NAMES[segment.kind] for segment in state.segments]
        own = list(self.own.segments)
        shared = kinds[: -len(own)]
        if kinds[-len(own) :] != own or not set(shared) <= set(self.plan.segments) or (shared and not self.is_shared):
            self._fail(f"segments {', '.join(kinds)} must be those of the plan, {', '.join(own)} last")
        turned = (0, 0) if rotation is None else (rotation.block, rotation.interleaved_pairs)
        if (state.block, state.interleaved_pairs) != turned:
            self._fail(f"block and interleaved pairs {state.block}, {state.interleaved_pairs} must be {turned}")

    @property
    def is_shared(self) -> bool:
        """Whether all rows share the tokens."""
        return self.group.prefix is not None

    def _names(self) -> dict[int, str]:
        """What the file calls each tensor, by id."""
        return {id(x): name for x, name in zip(self.state.flatten()[0], self.layer.tensors, strict=True)}

    def _check_tensors(self) -> None:
        names = self._names()
        for part, x, dtype, shape in self._wanted():
            if x.dtype != dtype or tuple(x.shape) != shape:
                self._fail(f"{names[id(x)]} ({part}) is {x.dtype} {list(x.shape)}, and must be {dtype} {list(shape)}")
        for segment in self.state.segments:
            if segment.rotations is not None:
                self._check_rotations(segment, names[id(segment.rotations)])

    def _wanted(self) -> Iterator[Wanted]:
        """Each tensor but rotations, with the dtype and shape that it must have."""
        state = self.state
        yield "cursor", state.cursor, torch.int64, (3,)
        for name, dense in (("first", state.first), ("tail", state.tail)):
            for stream, x in (("key", dense.key), ("value", dense.value)):
                if x.dim() != 4:
                    self._fail(
                        f"{self._names()[id(x)]} ({name} {stream}) is {list(x.shape)}, and must be [1, heads, slots, dim]"
                    )
        _, heads, first_slots, key_dim = state.first.key.shape
        dims = {"key": key_dim, "value": state.first.value.shape[3]}
        for name, dense, slots in (("first", state.first, first_slots), ("tail", state.tail, self.plan.tail_slots)):
            for stream, x in (("key", dense.key), ("value", dense.value)):
                yield f"{name} {stream}", x, self.dense_dtype, (1, heads, slots, dims[stream])
        yield "positions of first", state.first_positions, torch.int32, (1, first_slots)
        identity = StreamBasis(*[torch.empty(0)] * 3)
        for i, segment in enumerate(state.segments):
            plan = self.own if i >= len(state.segments) - len(self.own.segments) else self.plan
            kind = KIND_NAMES[segment.kind]
            if segment.positions.dim() != 2:
                self._fail(
                    f"{self._names()[id(segment.positions)]} is {list(segment.positions.shape)}, and must be [1, slots]"
                )
            slots = segment.positions.shape[1]
            yield f"positions of {kind}", segment.positions, torch.int32, (1, slots)
            both = codings(plan, self.layer.layer, kind, self.dense_dtype, identity)
            for name, packed, coding in zip(("key", "value"), segment.streams, both, strict=True):
                width, rest = divmod(heads * dims[name], plan.groups)
                scope = getattr(plan.layers[self.layer.layer], f"{kind}_{name}").scope
                if rest:
                    self._fail(f"{heads} heads of {dims[name]} cannot be {plan.groups} groups")
                yield from self._wanted_of_stream(f"{kind} {name}", packed, coding, scope, (slots, width))

    def _wanted_of_stream(
        self, name: str, stream: PackedStream, coding: Coding, scope: str, size: tuple[int, int]
    ) -> Iterator[Wanted]:
        """The same of one stream, of so many slots and so wide a head group."""
        slots, width = size
        groups = self.plan.groups
        if stream.bands != coding.bands:
            self._fail(f"{name}: bands {stream.bands.counts} must be {coding.bands.counts}")
        if scope == "model":
            yield f"{name} codes", stream.codes, torch.uint8, (1, groups, slots, coding.bands.token_bytes)
        else:
            dtype = self.dense_dtype if scope == "half" else self.dtype
            yield f"{name} codes", stream.codes, dtype, (1, groups, slots, width)
        yield f"{name} scales", stream.scale, torch.float16, (1, groups, slots) if coding.is_scaled else (0,)
        for part, x in stream.basis._asdict().items():
            known = getattr(coding.basis, part)
            yield f"{name} {part}", x, known.dtype, tuple(known.shape)
        if scope == "model" and stream.basis.mean.shape != (1, groups, width):
            self._fail(f"{name}: tokens are {width} wide, and the plan's {stream.basis.mean.shape[-1]}")

    def _check_rotations(self, segment: Segment, name: str) -> None:
        """Every block of slots has a rotation."""
        given, pairs = segment.rotations, len(self.plan.rotation.frequencies)
        blocks = -(-segment.positions.shape[1] // self.plan.rotation.block)
        if (
            given.dtype != torch.float32
            or given.dim() != 4
            or given.shape[1] < blocks
            or given.shape[::2] != (1, 2)
            or given.shape[3] != pairs
        ):
            self._fail(
                f"{name} is {given.dtype} {list(given.shape)}, and must be torch.float32 [1, {blocks} or more, 2, {pairs}]"
            )

    def _check_places(self) -> None:
        """Cursor and positions are within what is held."""
        group, state = self.group, self.state
        held, packed, origin = state.cursor.tolist()
        end = origin + state.text.slots
        if held != self.tokens or not max(held - state.tail.slots, 0) <= packed <= held:
            self._fail(
                f"cursor {[held, packed, origin]} must have the {self.tokens} tokens of the prompt, and a tail of {state.tail.slots}"
            )
        if origin != self.layer.origin or not origin <= packed <= end:
            self._fail(
                f"cursor {[held, packed, origin]} must begin at {self.layer.origin}, with its end within {state.text.slots} slots"
            )
        if self.is_shared and (origin != packed or any(s.slots for s in state.segments[-len(self.own.segments) :])):
            self._fail("a prefix that rows share has no slots of its own")
        given = group.assigned, group.laid_out, group.floor
        if given[:2] != (end, [held, packed]) or not 0 <= group.floor <= held:
            self._fail(f"assigned, laid_out and floor {given} must be {end}, {[held, packed]} and 0 to {held}")
        names = self._names()
        for x in (state.first_positions, *(segment.positions for segment in state.segments)):
            if x.numel() and not (int(x.min()) >= -1 and int(x.max()) < max(held, end)):
                self._fail(f"{names[id(x)]}: positions must be -1 to {max(held, end) - 1}")


def check_group(group: GroupValues, plan: Plan, tensors: Mapping[str, Tensor], tokens: int) -> None:
    """Raise ValueError for numbers and coordinates of a group that do not fit a prompt of so many tokens."""
    if group.prefix != (tokens if group.window is None else None):
        raise ValueError(f"prefix={group.prefix} must be {tokens} without a window, else null")
    if not tokens <= group.capacity <= tokens + CAPACITY_GRAIN + MAX_APPEND:
        raise ValueError(f"capacity={group.capacity} must be {tokens} to {tokens + CAPACITY_GRAIN + MAX_APPEND}")
    if not group.coordinates:
        if plan.rotation is not None:
            raise ValueError("coordinates: missing, and keys rotate by them")
        return
    known, shift = (tensor_named(group.coordinates[name], tensors) for name in ("known", "shift"))
    count = plan.rotation.coordinate_count if plan.rotation is not None else shift.shape[-1] if shift.dim() else 1
    if known.dtype != torch.float32 or known.dim() != 3 or known.shape[::2] != (1, count) or known.shape[1] > tokens:
        raise ValueError(
            f"{group.coordinates['known']} is {known.dtype} {list(known.shape)}, and must be torch.float32 [1, {tokens} or fewer, {count}]"
        )
    if shift.dtype != torch.float32 or tuple(shift.shape) != (1, 1, count):
        raise ValueError(
            f"{group.coordinates['shift']} is {shift.dtype} {list(shift.shape)}, and must be torch.float32 [1, 1, {count}]"
        )


def tensor_named(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor by its name; raises ValueError where there is none."""
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing")
    return tensors[name]
