"""What the packed layers of a cache that see the same tokens share."""

from torch import Tensor

from apack_compile.cache.token_index import Assignment, Chunk, Kept
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.plan import Plan


class SharedIndex:
    """The plan, the slots' positions, and what the coming chunk is, of all layers that see so many of the newest tokens.

    window: newest tokens that a query sees, itself included; None for all. positions: int32 `[B, slots]` of first, vision, text.
    capacity: logical length of what `unpack` returns; length: instead of it, of an eager step that may return held tokens alone.
    floor: first position that can still be cropped. assigned: end of the positions that have a text slot. steps: decode steps
    since the last layout; refreshed_at: tokens held at the last one. is_watched: whether a forward pass that runs eagerly is known to
    have begun, so that its attentions can be served by `attend`. turns: of vision and text, float32 `[B, blocks, 2, P]`, by which packed
    keys are turned back; empty where they are not. coordinates: of the tokens, by which keys turn. laid_out, laid_out_turns: what
    layers have which the chunk being stored has not reached. kept: slots of vision and text that the chunk being stored leaves, in
    their new order; None where these are all that are used. chunk, assignment: of the chunk being stored; None while tokens are
    only appended. is_draft: whether all tokens of the chunk that came last may be cropped again.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.plan: Plan | None = None
        self.positions: list[Tensor] = []
        self.turns: list[Tensor] = []
        self.coordinates: TokenCoordinates | None = None
        self.laid_out: list[Tensor] = []
        self.laid_out_turns: list[Tensor] = []
        self.kept: list[Kept] | None = None
        self.capacity = 0
        self.length: int | None = None
        self.floor = 0
        self.assigned = 0
        self.chunk: Chunk | None = None
        self.assignment: Assignment | None = None
        self.spare = 0
        self.steps = 0
        self.refreshed_at = -1
        self.is_watched = False
        self.is_draft = False

    def end_chunk(self) -> None:
        """The layers have stored the chunk, or it is only appended."""
        self.laid_out, self.laid_out_turns, self.kept = [], [], None
        self.chunk = self.assignment = None

    def forget(self) -> None:
        """Everything but the window and the plan."""
        plan = self.plan
        self.__init__(self.window)  # type: ignore[misc]
        self.plan = plan
