"""What the packed layers of a cache that see the same tokens share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from apack_compile.cache.token_index import Assignment, Chunk, Kept
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
class ChunkPlan:
    """Where the tokens of a chunk go in every layer, and what layers have which it has not reached.

    assignment: of the chunk's tokens to slots. spare: free text slots behind them. kept: slots of vision and text that the chunk
    leaves, in their new order; None where these are all that are used. positions, rotations: those of before.
    """

    chunk: Chunk
    assignment: Assignment
    spare: int
    kept: Mapping[str, Kept] | None
    positions: list[Tensor]
    rotations: list[Tensor]


@dataclass
class SharedIndex:
    """The plan, the slots' positions, and the chunk being stored, of all layers that see so many of the newest tokens.

    window: newest tokens that a query sees, itself included; None for all. positions: int32 `[B, slots]` of first, vision, text.
    rotations: of vision and text, float32 `[B, blocks, 2, P]`, by which packed keys are rotated back; empty where they are not.
    coordinates: of the tokens, by which keys rotate. assigned: end of the positions that have a text slot. capacity: logical length of
    what `unpack` returns; length: instead of it, of an eager step that may return held tokens alone. chunk: None while tokens are
    only appended. is_draft: whether all tokens of the chunk that came last may be cropped again. is_watched: whether a forward pass
    that runs eagerly is known to have begun, so that its attentions can be served by `attend`.
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
    is_draft: bool = False
    is_watched: bool = False

    def forget(self) -> None:
        """Everything but the window and the plan."""
        self.__init__(self.window, self.plan)  # type: ignore[misc]
