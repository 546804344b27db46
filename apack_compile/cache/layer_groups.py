"""All groups of packed layers of a cache: their plans, room for tokens to come, and which tokens may be cropped again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apack_compile.cache.chunk_places import Before, Shape
from apack_compile.cache.eviction import Settling
from apack_compile.cache.layer import MAX_APPEND, CompactedLayer
from apack_compile.cache.layer_group import FlagsOfBoth, LayerGroup
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.cache.layer_store import recompact
from apack_compile.cache.packed_layers import packed_layer
from apack_compile.cache.token_index import Flags, to_host
from apack_compile.models.coordinates import TokenCoordinates, coordinates_of
from apack_compile.plan.budget import spare_slots
from apack_compile.plan.plan import Plan
from apack_compile.plan.rotation import rotary_start
from apack_compile.plan.source import PlanSource

CAPACITY_GRAIN = 256


class LayerGroups:
    """The groups; the first one sees the most tokens.

    source: gives the plans; None once it was asked. expected_tokens: to make room for. max_tokens: of a cache with room for all of
    them from the start. history: which tokens are vision and which padding, where bases are fitted to all of them. prompt_end: where
    generate's prompt ends, tokens from there on are generated or drafted, never pictures. recorded_from: while tokens may be cropped
    again in any number, where none of those before it will be. rope_deltas: what the model remembers of a prefix (coordinates.py).
    """

    def __init__(self, source: PlanSource, expected_tokens: int, max_tokens: int | None) -> None:
        self._groups: list[LayerGroup] = []
        self.source: PlanSource | None = source
        self.expected_tokens = expected_tokens
        self.max_tokens = max_tokens
        self.history: tuple[Tensor, Tensor] | None = None
        self.prompt_end: int | None = None
        self.recorded_from: int | None = None
        self.rope_deltas: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[LayerGroup]:
        return iter(self._groups)

    def __getitem__(self, i: int) -> LayerGroup:
        return self._groups[i]

    def add(self, kind: LayerKind, own: Any) -> CompactedLayer:
        """The packed layer in the place of transformers' `own`, in the group with its window."""
        group = next((group for group in self if group.window == kind.window), None)
        if group is None:
            group = LayerGroup(kind.window)
            self._groups = sorted((*self, group), key=lambda group: group.window is not None)
        group.layers.append(packed_layer(kind.layer, group.index, own))
        return group.layers[-1]

    @property
    def held(self) -> int:
        """Tokens of a row."""
        return self[0].held

    @property
    def floor(self) -> int:
        """First position that can still be cropped."""
        return max(group.floor for group in self)

    @property
    def is_branch(self) -> bool:
        """Whether rows share a prefix."""
        return any(group.index.prefix is not None for group in self)

    @property
    def plans(self) -> tuple[Plan | None, ...]:
        """The plan of each group."""
        return tuple(group.index.plan for group in self)

    def drafted(self, held: int, end: int) -> int:
        """How many of the newest of `end` tokens may be cropped again, whatever their number, once a chunk from `held` on is stored."""
        # while its past is recorded, what an empty cache is given is a prompt, unless generate says where that ends
        recorded = self.recorded_from if held else None
        known = [position for position in (recorded, self.prompt_end) if position is not None]
        return max(end - max(known), 0) if known else 0

    def settled(self, held: int, floor: int) -> int:
        """Of `held` tokens, the first that may be cropped again, with `floor` the first that can be."""
        if self.recorded_from is None:
            return held
        return min(max(self.recorded_from, self.prompt_end or 0, floor), held)

    def choose_plans(self, vision: Flags, padding: Flags) -> None:
        """Choose the plans, once, for a prompt of which these tokens are vision and padding, bool `[B, T]` each, on the host."""
        for group in self if self.source is not None else ():
            newest = slice(None if group.window is None else -group.window, None)
            real = ~padding[:, newest]
            share = float(np.float32((vision[:, newest] & real).sum()) / np.float32(max(real.sum(), 1)))
            group.index.plan = self.source.plan_for(real.shape[1], share, group.window)
        self.source = None

    def on_host(self, flags: Sequence[Tensor | None], batch: int, tokens: int) -> tuple[FlagsOfBoth, list[Before]]:
        """Flags of a chunk, bool `[B, n]` each (none where they are missing or of another shape), and what each group holds: one wait."""
        self.end_settling()
        given = [f for f in flags if f is not None and f.shape == (batch, tokens)]
        places = [group.places() if group.layers[0].is_initialized else [] for group in self]
        read = to_host([*given, *(tensor for of_group in places for tensor in of_group)])
        none = np.zeros((batch, tokens), bool)
        found = [read.pop(0) != 0 if any(f is g for g in given) else none for f in flags]
        befores = [Before.of([read.pop(0) for _ in of_group]) for of_group in places]
        return (found[0], found[1]), befores

    def lay_out(self, chunk: FlagsOfBoth, befores: Sequence[Before], shape: Shape) -> None:
        """Assign a chunk's tokens, of which these are vision and padding, on the host, to slots."""
        tokens, held = chunk[0].shape[1], befores[0].cursor[0]
        end = held + tokens
        history = self._extended_history(chunk, held)
        for group, before in zip(self, befores, strict=True):
            group.lay_out(chunk, before, self.drafted(held, end), self._spare(end), shape, history)
            # a chunk that `get_mask_sizes` took for an append keeps the capacity that it announced
            if tokens > MAX_APPEND or end > group.index.capacity:
                group.index.capacity = max(group.index.capacity, self._capacity(end))

    def note_cursors(self, tokens: int) -> None:
        """Before several tokens are appended: where layers with a window are, whose text slots are a ring."""
        rings = [group for group in self if group.window is not None] if tokens > 1 else []
        cursors = to_host([group.layers[0].cursor for group in rings])
        for group, cursor in zip(rings, cursors, strict=True):
            group.index.begun = int(cursor[0]), int(cursor[1])

    def end_chunk(self) -> None:
        """All layers have stored it."""
        for group in self:
            group.index.chunk = None

    def follow_coordinates(self, shown: Tensor | None, padding: Tensor, held: int) -> bool:
        """Follow a chunk that begins at index `held` and whose rotary embedding was `shown` these positions; padding: bool `[B, n]`.

        Gives whether all that plans need was shown.
        """
        known: dict[tuple[int, bool], TokenCoordinates] = {}
        was_shown, (rows, tokens) = True, padding.shape
        for group in self:
            plan = group.index.plan
            count, must_be_shown = 1 if plan.rotation is None else plan.rotation.coordinate_count, plan.has_coordinates
            if (count, must_be_shown) not in known:
                coordinates = group.index.coordinates
                if not held:
                    coordinates = TokenCoordinates.starting_at(rotary_start(padding), count)
                seen = coordinates_of(shown, rows, tokens, count) if must_be_shown else None
                if seen is not None:
                    coordinates = coordinates.followed_by(seen.to(padding.device), padding, held)
                was_shown &= seen is not None or not must_be_shown
                known[count, must_be_shown] = coordinates
            group.index.coordinates = known[count, must_be_shown]
        return was_shown

    def _extended_history(self, chunk: FlagsOfBoth, held: int) -> FlagsOfBoth:
        """Where bases are fitted to every token, which are vision and padding. Those appended since the last layout are text."""
        if not any(plan.per_request for plan in self.plans):
            return chunk
        if self.history is not None and held:
            past = [flags[:, :held].numpy() for flags in self.history]
            padded = [np.pad(flags, ((0, 0), (0, held - flags.shape[1]))) for flags in past]
            chunk = np.concatenate([padded[0], chunk[0]], 1), np.concatenate([padded[1], chunk[1]], 1)
        self.history = torch.from_numpy(chunk[0]), torch.from_numpy(chunk[1])
        return chunk

    def _spare(self, tokens: int) -> int:
        """Free text slots to keep when `tokens` tokens are held."""
        if self.max_tokens is not None:
            return self.max_tokens - tokens
        return max(16, min(self.expected_tokens, spare_slots(tokens)))

    def _capacity(self, tokens: int) -> int:
        """Logical length to offer when `tokens` tokens are held."""
        if self.max_tokens is not None:
            return self.max_tokens
        return -(-(tokens + max(self.expected_tokens, MAX_APPEND)) // CAPACITY_GRAIN) * CAPACITY_GRAIN

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens: grow the storage, reuse it, or pack a full tail."""
        held = self.held
        if held + tokens > self[0].index.capacity:
            for group in self:
                group.index.capacity = self._capacity(held + tokens)
        self.refresh(held)
        if any(group.index.plan.per_request and group.missing(tokens) > 0 for group in self):
            self._pack_tails()
        for group in self:
            if not group.index.plan.per_request:
                group.reserve(tokens, self._spare(held), self.settled(held, group.floor))

    def make_room(self) -> None:
        """Free slots for what follows a prefix: a compiled step takes none for a constant."""
        held = self.held
        for group in self:
            group.index.capacity = max(group.index.capacity, self._capacity(held))
            if group.index.prefix is not None:
                group.grow(self._spare(held))

    def _pack_tails(self) -> None:
        """Lay out what is held anew, where bases are fitted to it."""
        layers = sorted((layer for group in self for layer in group.layers), key=lambda layer: layer.layer_idx)
        first = layers[0]
        none, befores = self.on_host((None, None), first.batch_size, 0)
        self.lay_out(
            none,
            befores,
            Shape(
                first.batch_size,
                first.num_heads,
                first.first.key.shape[3],
                first.first.value.shape[3],
                first.dtype,
                first.device,
            ),
        )
        for layer in layers:
            recompact(layer)
        self.end_chunk()

    def refresh(self, held: int) -> None:
        """Before a step, once: choose anew by importance, where plans have tiers."""
        for group in self:
            group.refresh(held, self.settled(held, group.floor))

    def settle(self, layer: CompactedLayer, importance: Tensor, drafted: int) -> None:
        """Give a layer the importance `[B, T]` after a prompt of which the newest `drafted` tokens may be cropped again."""
        if layer.index.is_draft and layer.tiers.earlier:
            layer.observe_draft(importance)
            return
        group = next(group for group in self if layer in group.layers)
        end, start = layer.index.laid_out
        settled = max(end - drafted, group.known_floor)
        group.settle(Settling.begin(layer, importance, min(start, settled)))
        group.steps, group.refreshed_at = 0, -1

    def end_settling(self) -> None:
        """No layer that has taken the importance of its tokens is left that waits for the host."""
        for group in self:
            group.end_settling()

    def unsettled(self) -> list[int]:
        """Layers with tiers whose attention was not seen since their last layout."""
        self.end_settling()
        layers = [layer for group in self for layer in group.layers]
        return sorted(layer.layer_idx for layer in layers if layer.tiers is not None and not layer.tiers.settled)

    def check_cropped(self, tokens: int) -> None:
        """Raise ValueError where so many of the newest tokens cannot be removed."""
        held = self.held
        croppable = held - self.floor
        if tokens > croppable:
            why = "" if held == croppable else ", the others are packed for good"
            if self[0].index.prefix is not None and croppable == held - self[0].index.prefix.tokens:
                raise ValueError(
                    f"crop: cannot remove {tokens} of {held} tokens; only the newest {croppable} can go, the others are the prefix"
                )
            if why and self.recorded_from is None:
                why += "; call activate_past_recording() on the cache before the tokens that may have to go"
            raise ValueError(f"crop: cannot remove {tokens} of {held} tokens; only the newest {croppable} can go{why}")

    def forget(self) -> None:
        """Forget every token; plans stay."""
        for group in self:
            group.forget()
        self.history, self.recorded_from = None, None if self.recorded_from is None else 0

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to every tensor that has a row per sequence."""
        if self.history is not None:
            self.history = (change(self.history[0]), change(self.history[1]))
        # once for all groups that share them: a change may be in place
        known = {id(group.index.coordinates): group.index.coordinates for group in self}
        changed = {shared: coordinates.mapped(change) for shared, coordinates in known.items()}
        for group in self:
            group.change_rows(change, changed[id(group.index.coordinates)])
