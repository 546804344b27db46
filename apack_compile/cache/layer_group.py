"""The packed layers of a cache that see the same tokens: where chunks go, and room for tokens to come, decided once for all of them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from apack_compile.cache.chunk_places import Before, Shape, tail_tokens
from apack_compile.cache.coarse_choice import coarse_choice
from apack_compile.cache.eviction import LAYERS_BEHIND, Settling
from apack_compile.cache.first_choice import Floor, highest
from apack_compile.cache.layer import CompactedLayer
from apack_compile.cache.shared_index import ChunkPlan, SharedIndex
from apack_compile.cache.token_index import (
    Chunk,
    Flags,
    Kept,
    Taken,
    assign,
    count_of,
    extended,
    kept_slots,
    positions_of,
    there,
    to_host,
    without_bad_bargains,
)
from apack_compile.kernels.format import StreamBasis
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.plan import MODALITIES
from apack_compile.plan.ring import block_for, in_order, leading_blocks_dropped, ring_slots, whole_blocks
from apack_compile.plan.rotation import rotations_of_blocks

FlagsOfBoth = tuple[Flags, Flags]


class LayerGroup:
    """Layers with one index. window: newest tokens that a query of theirs sees, itself included; None for all.

    known_floor: first position that can still be cropped, before evictions that nobody asked after. steps: decode steps since the last
    layout; refreshed_at: tokens held at the last one.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.index = SharedIndex(window)
        self.layers: list[CompactedLayer] = []
        self.known_floor, self.steps, self.refreshed_at = 0, 0, -1
        self._floors: list[Floor] = []
        self._settling: list[Settling] = []

    @property
    def floor(self) -> int:
        """First position that can still be cropped."""
        self.end_settling()
        if self._floors:
            self.floor = max(self.known_floor, highest(self._floors))
        return self.known_floor

    @floor.setter
    def floor(self, floor: int) -> None:
        self.known_floor, self._floors = floor, []

    def raise_floor(self, floor: Floor | None) -> None:
        """Follow an eviction in a layer, after which no position before `floor` can be cropped."""
        if floor is not None:
            self._floors = [*self._floors, floor]

    def settle(self, newest: Settling) -> None:
        """Rank what a layer keeps or, where only the device knows how much that is, what the layers before it keep."""
        if newest.eviction is None:
            self.raise_floor(newest.finish())
            return
        self._settling = [*self._settling, newest]
        self.end_settling(0 if newest.layer is self.layers[-1] else LAYERS_BEHIND)

    def end_settling(self, left: int = 0) -> None:
        """Evict from the layers that wait for the host to know how much, but the newest `left`."""
        while len(self._settling) > left:
            oldest, *self._settling = self._settling
            self.raise_floor(oldest.finish())

    def forget(self) -> None:
        """Forget every token; the plan stays."""
        self.index.forget()
        self._settling = []
        self.floor, self.steps, self.refreshed_at = 0, 0, -1

    @property
    def held(self) -> int:
        """Tokens of a row."""
        return int(self.layers[0].get_seq_length())

    @property
    def reuses_slots(self) -> bool:
        """Whether text slots are a ring (ring.py); layers that are packed anew need none."""
        return self.window is not None and not self.index.plan.per_request

    @property
    def block(self) -> int:
        """Text slots that are reused at once."""
        rotation = self.index.plan.rotation
        return block_for(self.window) if rotation is None else rotation.block

    @property
    def ring_slots(self) -> int:
        """Text slots that the window needs."""
        return ring_slots(self.window, self.index.plan.tail_slots, self.block)

    def lay_out(
        self, chunk: FlagsOfBoth, before: "Before", drafted: int, spare: int, shape: Shape, history: FlagsOfBoth
    ) -> None:
        """Assign a chunk's tokens to slots and update the shared positions.

        chunk, history: which tokens are vision and which padding, bool `[B, n]` each, on the host; of the chunk, and of all tokens where
        bases are fitted to them. before: what is held. spare: free text slots for tokens to come. shape: of the states.
        """
        index, plan, device = self.index, self.index.plan, shape.device
        vision, padding = chunk if plan.separates_vision else (np.zeros_like(chunk[0]), chunk[1])
        held, packed, origin = before.cursor
        end = held + vision.shape[1]
        kept, waiting = None, None
        if plan.per_request:
            tokens = Chunk(*history, 0)
            whole = assign(tokens, plan.first_tokens, 0, drafted, self.window)
            assignment = without_bad_bargains(whole, plan, shape.width)
        else:
            if held > packed:
                none = np.zeros((vision.shape[0], held - packed), bool)
                vision, padding = np.concatenate([none, vision], 1), np.concatenate([none, padding], 1)
                waiting = there(np.arange(packed, held) % max(plan.tail_slots, 1), device)
            tokens = Chunk(vision, padding, packed)
            # a row whose first chunk was short, or mostly padding, still lacks first tokens
            found = (before.first >= 0).sum(1, keepdims=True) if held else 0
            if index.prefix is not None or (self.window is not None and held >= self.window):
                found = plan.first_tokens
            assignment = assign(tokens, plan.first_tokens - found, plan.tail_slots, drafted, self.window)
        self.floor = self._floor_after(end, drafted, assignment.recent, tokens.vision.shape[1])
        start, fresh = end - assignment.tail, not held or plan.per_request
        new = [positions_of(i, tokens.start) for i in (assignment.first, assignment.vision, assignment.text)]
        if not fresh and not plan.layers_place_tokens:
            kept = self._kept(before, packed - origin)
        used_text = 0 if fresh else packed - origin if kept is None else count_of(kept["text"])
        spare = self._spare(used_text + new[2].shape[1], spare)
        if not plan.per_request and plan.coarse is None:
            free = np.broadcast_to(np.arange(start, start + spare, dtype=np.int32), (len(vision), spare))
            new[2] = np.concatenate([new[2], free], 1)
        earlier = index.positions, index.rotations
        index.positions = [there(p, device) for p in new]
        if kept is not None:
            old = [
                kept_slots(p, kept_here, 1)
                for p, kept_here in zip(earlier[0], (earlier[0][0].shape[1], kept["vision"], kept["text"]), strict=True)
            ]
            both = zip(old, index.positions, strict=True)
            index.positions = [torch.cat(pair, 1) if pair[1].shape[1] else pair[0] for pair in both]
        coarse = None
        if plan.coarse is not None:
            coarse = coarse_choice(
                plan.coarse,
                plan.rotation,
                tokens,
                assignment,
                spare,
                index.coordinates,
                shape.of_state,
                plan.segments,
                device,
            )
        text_slots = assignment.text.shape[1] if coarse is None else coarse.text_slots
        origin_then = start - used_text - text_slots
        index.chunk = ChunkPlan(
            chunk=tokens,
            assignment=assignment,
            spare=spare,
            kept=kept,
            positions=earlier[0],
            rotations=earlier[1],
            held=held,
            packed=packed,
            end=end,
            start=start,
            text_origin=origin_then,
            first=Taken.at(assignment.first, device),
            first_positions=there(new[0], device),
            tail=Taken.at(tail_tokens(start, end, tokens, plan.tail_slots), device),
            segments={name: Taken.at(getattr(assignment, name), device) for name in MODALITIES},
            waiting=waiting,
            cursor=there(np.array([end, start, origin_then]), device),
            identity=StreamBasis(*[torch.empty(0, device=device)] * 3),
            offered=shape.offered,
            coarse=coarse,
        )
        index.assigned, index.laid_out = start + spare, (end, start)
        index.budgets, index.choices = {}, {}
        if plan.coarse is not None:
            index.positions = []
        self.follow_positions()

    def _floor_after(self, end: int, drafted: int, recent: int, tokens: int) -> int:
        """First position that can be cropped once a chunk of so many tokens, the newest text `recent` of them, ends at `end`."""
        # a chunk that is all newest text has the slots behind those of the text before it, which can still be cropped
        goes_on = recent == tokens
        # tokens that no state from an earlier floor on needs may be gone
        kept = 0 if self.index.prefix is None else self.index.prefix.tokens
        earlier = self.floor if goes_on or self.window is not None else kept
        return max(end - (max(recent, drafted) if goes_on else recent), earlier)

    def _kept(self, before: "Before", used: int) -> dict[str, Kept]:
        """Slots of vision and text that a chunk leaves: of a window, those that a query at the floor or later sees, in order."""
        packed, device = before.cursor[1], self.layers[0].device
        if self.window is None:
            return {"vision": self.index.positions[1].shape[1], "text": used}
        keep_from = self.floor - self.window + 1
        vision, text = before.packed
        return {
            "vision": there(leading_blocks_dropped(vision, self.block, keep_from, packed), device),
            "text": there(in_order(text, used, self.block, keep_from, packed), device),
        }

    def places(self) -> list[Tensor]:
        """What a chunk needs to know of what is held: the cursor, positions of the first tokens and, of a window, of its slots."""
        layer = self.layers[0]
        window = [] if self.window is None else self.index.positions[1:]
        return [layer.cursor, layer.positions()[0], *window]

    def _spare(self, used: int, spare: int) -> int:
        """Free text slots behind the used ones: `spare`, or what completes a ring."""
        if not self.reuses_slots or used + spare < self.ring_slots:
            return spare
        return max(self.ring_slots, whole_blocks(used, self.block)) - used

    def follow_positions(self) -> None:
        """Rotations of the slots as they are now."""
        index = self.index
        if index.plan.rotation is not None:
            index.rotations = [
                rotations_of_blocks(positions, index.coordinates, index.plan.rotation)
                for positions in index.positions[1:]
            ]
        self.mark_positions()

    def mark_positions(self) -> None:
        """As the layers do with their tensors: static addresses, any number of slots."""
        for position in (*self.index.positions, *self.index.rotations):
            torch._dynamo.mark_static_address(position, guard=False)
            if position.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(position, 1)

    def missing(self, tokens: int) -> int:
        """Text slots that `tokens` more tokens lack; where bases are fitted anew, slots of the tail."""
        if not self.reuses_slots:
            return tokens - self.layers[0].free_slots()
        return self.held + tokens - self.index.plan.tail_slots - self.index.assigned

    def reserve(self, tokens: int, spare: int, settled: int) -> None:
        """Make room in the text slots for `tokens` more tokens: add some, `spare` of them free, or reuse those out of the window.

        settled: tokens of which none will be cropped.
        """
        if not self.reuses_slots:
            if (missing := self.missing(tokens)) > 0:
                self.grow(max(missing, spare))
            return
        while (missing := self.missing(tokens)) > 0:
            slots = self.layers[0].text_slots
            if slots < self.ring_slots:
                wanted = slots + max(missing, spare)
                whole = max(self.ring_slots, whole_blocks(slots + missing, self.block))
                self.grow((whole if wanted >= self.ring_slots else wanted) - slots)
            elif not self._reuse_block(settled):
                self._straighten()
                used = self.layers[0].text_slots
                self.grow(whole_blocks(used + max(self.missing(tokens), spare), self.block) - used)
        layer = self.layers[0]
        end = layer.origin + layer.text_slots
        if self.index.assigned > end and layer.packed >= end:
            for layer in self.layers:
                layer.move_origin(layer.origin + layer.text_slots)

    def grow(self, slots: int) -> None:
        """Add text slots for the positions to come."""
        index, layer = self.index, self.layers[0]
        end = layer.text_slots + layer.origin
        if not index.plan.layers_place_tokens:
            index.positions[2] = extended(index.positions[2], end, slots)
            self.follow_positions()
        for layer in self.layers:
            layer.grow(slots)
        index.assigned = end + slots

    def _reuse_block(self, settled: int) -> bool:
        """Give the oldest block of text slots to the positions to come, in place; False where one of its tokens may be seen again."""
        index, text = self.index, self.index.positions[2]
        slots = text.shape[1]
        start = (index.assigned - self.layers[0].origin) % slots
        block = text[:, start : start + self.block]
        unseen_from = int(block.max()) + self.window
        if unseen_from > settled:
            return False
        block.copy_(torch.arange(index.assigned, index.assigned + self.block, device=block.device))
        if index.rotations:
            anchor = index.coordinates.at(block[:, :1])
            index.rotations[1][:, start // self.block] = index.plan.rotation.at(anchor)[:, 0]
        index.assigned += self.block
        self.floor = max(self.floor, unseen_from)
        return True

    def _straighten(self) -> None:
        """Put the text slots in the order of their positions, without those that are free or that no query sees."""
        index, layer = self.index, self.layers[0]
        packed = layer.packed
        keep_from = self.floor - self.window + 1
        (text,) = to_host([index.positions[2]])
        kept = there(in_order(text, packed - layer.origin, self.block, keep_from, packed), layer.device)
        index.positions[2] = kept_slots(index.positions[2], kept, 1)
        for layer in self.layers:
            layer.keep_text(kept, packed)
        index.assigned = packed

    def refresh(self, held: int, settled: int) -> None:
        """Before a step, once: choose anew by importance, where the plan has tiers. settled: tokens of which none will be cropped."""
        plan = self.index.plan.tiers
        if plan is None or plan.reads_all or self.refreshed_at == held:
            return
        if not all(layer.tiers.settled for layer in self.layers):
            return
        self.refreshed_at, done = held, self.steps
        self.steps += 1
        for layer in self.layers:
            if done and done % plan.refresh_every == 0:
                layer.rank()
            if plan.revisits and self.steps % plan.refresh_every == 0:
                layer.tiers.attend_all()
        if plan.prune_every is not None and done and done % plan.prune_every == 0:
            end = min(self.layers[0].packed, settled)
            for layer in self.layers:
                self.raise_floor(layer.evict([("text",)], end))

    def crop(self, tokens: int) -> None:
        """Remove the newest `tokens` tokens; the cache has checked that it can."""
        for layer in self.layers:
            layer.crop(tokens)
        first = self.layers[0]
        if self.reuses_slots and first.packed < first.origin:
            for layer in self.layers:
                layer.move_origin(layer.origin - layer.text_slots)

    def change_rows(self, change: Callable[[Tensor], Tensor], coordinates: TokenCoordinates) -> None:
        """Apply a change of the batch to every tensor that has a row per sequence; coordinates: these, changed."""
        index = self.index
        # rows share those of a prefix's first tokens
        own = slice(0 if index.prefix is None else 1, None)
        index.positions[own] = map(change, index.positions[own])
        index.rotations[:] = map(change, index.rotations)
        index.coordinates = coordinates
        for layer in self.layers:
            layer.change_rows(change)
            layer.follow_tensors()
        self.mark_positions()
