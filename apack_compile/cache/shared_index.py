"""What the packed layers of a cache that see the same tokens share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apack_compile.cache.coarse_choice import CoarseChoice
from apack_compile.cache.first_choice import FirstChoice
from apack_compile.cache.token_index import Assignment, Chunk, Kept, Taken
from apack_compile.kernels.format import StreamBasis
from apack_compile.kernels.state import Segment
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.plan import Plan


@dataclass(frozen=True)
class Incoming:
    """What a forward pass says of its chunk: vision and padding, bool `[B, n]`, None for none of them.

    shown: what the model's rotary embedding was given, `[C, B, n]` or `[B, n]`.
    """

    vision: Tensor | None = None
    padding: Tensor | None = None
    shown: Tensor | None = None


@dataclass(frozen=True)
class SharedTokens:
    """Packed tokens `[1, ...]` that all rows share; no copy of a cache has them twice, because nothing writes them."""

    segments: tuple[Segment, ...] = ()

    def __deepcopy__(self, memo: dict) -> "SharedTokens":
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """Codes and token scales, positions and rotations."""
        return [x for x, _ in self._with_slots]

    @property
    def _with_slots(self) -> list[tuple[Tensor, int]]:
        """The same, and the dimension of the slots."""
        packed = [(x, 2) for s in self.segments for x in (*s.key.tokens, *s.value.tokens)]
        placed = [(x, 1) for s in self.segments for x in (s.positions, s.rotations) if x is not None]
        return packed + placed

    def mark_static(self) -> None:
        """Tell the compiler that these tensors keep their addresses, and that another prefix has another number of slots."""
        for tensor, slots in self._with_slots:
            torch._dynamo.mark_static_address(tensor, guard=False)
            if tensor.dim() > slots and tensor.shape[slots] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, slots)


@dataclass(frozen=True)
class PrefixPlace:
    """A prefix that all rows share: so many tokens, packed by this plan."""

    tokens: int
    plan: Plan

    def __deepcopy__(self, memo: dict) -> "PrefixPlace":
        return self


@dataclass(frozen=True)
class ChunkPlan:
    """Where the tokens of a chunk go in every layer, worked out once, and what layers have which it has not reached.

    chunk, assignment: of its tokens to slots, on the host. spare: free text slots behind them. kept: slots of vision and text that the
    chunk leaves, in their new order; None where these are all that are used. positions, rotations: those of before.

    held, packed: tokens held before it, and the first position of the tail then; end, start: the same after it. first, tail, segments:
    which tokens go into the slots of first, tail and the packed segments; first_positions: int32 `[B, slots]`. waiting: slots of the
    tail of before that hold a token, in order. cursor: what the layers' cursors are then, with the position `text_origin` in text slot
    0. identity: the basis of streams that are kept as they are. offered: K and V of no tokens, for
    models that look at a layer's. coarse: how layers tell tokens apart.
    """

    chunk: Chunk
    assignment: Assignment
    spare: int
    kept: Mapping[str, Kept] | None
    positions: list[Tensor]
    rotations: list[Tensor]
    held: int
    packed: int
    end: int
    start: int
    text_origin: int
    first: Taken
    first_positions: Tensor
    tail: Taken
    segments: Mapping[str, Taken]
    waiting: Tensor | None
    cursor: Tensor
    identity: StreamBasis
    offered: tuple[Tensor, Tensor]
    coarse: CoarseChoice | None = None

    def counts(self, began: int) -> NDArray[np.int64]:
        """Vision and text tokens `[B, 2]` from position `began` on that get a slot."""
        first = max(began - self.chunk.start, 0)
        return np.stack([(index >= first).sum(1) for index in (self.assignment.vision, self.assignment.text)], 1)


@dataclass
class SharedIndex:
    """The plan, the slots' positions, and the chunk being stored, of all layers that see so many of the newest tokens.

    window: newest tokens that a query sees, itself included; None for all. positions: int32 `[B, slots]` of first, vision, text.
    rotations: of vision and text, float32 `[B, blocks, 2, P]`, by which packed keys are rotated back; empty where they are not.
    coordinates: of the tokens, by which keys rotate. assigned: end of the positions that have a text slot. capacity: logical length of
    what `unpack` returns; length: instead of it, of an eager step that may return held tokens alone. chunk: None while tokens are
    only appended. laid_out: tokens held after the last chunk that was, and the first position of the tail then; begun: the same before
    several tokens of a window are appended. budgets, choices: what the first layer that evicts leaves for the others. is_draft: whether
    all tokens of the chunk that came last may be cropped again. is_watched: whether a forward pass that runs eagerly is known to have
    begun, so that its attentions can be served by `attend`. prefix: what all rows share of a branch, which then has positions and
    rotations of its own tokens alone; None for nothing.
    """

    window: int | None = None
    plan: Plan | None = None
    positions: list[Tensor] = field(default_factory=list)
    rotations: list[Tensor] = field(default_factory=list)
    coordinates: TokenCoordinates | None = None
    assigned: int = 0
    capacity: int = 0
    length: int | None = None
    chunk: ChunkPlan | None = None
    laid_out: tuple[int, int] = (0, 0)
    begun: tuple[int, int] = (0, 0)
    budgets: dict[tuple, NDArray[np.int64]] = field(default_factory=dict)
    choices: dict[tuple[str, int], FirstChoice] = field(default_factory=dict)
    is_draft: bool = False
    is_watched: bool = False
    prefix: PrefixPlace | None = None

    def forget(self) -> None:
        """Everything but the window and the plan."""
        self.__init__(self.window, self.plan)  # type: ignore[misc]
