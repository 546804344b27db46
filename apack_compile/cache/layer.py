"""One layer of the packed cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from apack_compile.cache.drift import Fit, WatchedPair
from apack_compile.cache.eviction import evict
from apack_compile.cache.first_choice import Floor
from apack_compile.cache.layer_store import store
from apack_compile.cache.layer_tiers import LayerTiers
from apack_compile.cache.packed_pair import PackedPair
from apack_compile.cache.shared_index import SharedIndex, SharedTokens
from apack_compile.cache.stored_states import StoredStep
from apack_compile.cache.token_index import extended
from apack_compile.kernels.cursor import HELD, ORIGIN, PACKED
from apack_compile.kernels.state import TEXT, DenseSegment, FlatState, PackedState, Segment
from apack_compile.plan.plan import StreamPlan
from apack_compile.plan.rotation import deinterleaved_keys, rotations_of_blocks

# A chunk of at most this many tokens is appended, not laid out anew; its attention sees the whole capacity.
MAX_APPEND = 32
NO_ROTATIONS = (None, None, None)


class CompactedLayer(CacheLayerMixin):
    """Keys and values of one layer: first, vision, text and tail segments (docs/architecture.md)."""

    is_compileable = True
    is_croppable = True

    def __init__(self, layer_idx: int, index: SharedIndex) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.index = index
        # transformers makes the masks of such layers by their window
        self.is_sliding = index.window is not None
        self.first: DenseSegment | None = None
        self.tail: DenseSegment | None = None
        # Of a prefix that all rows share, as `first` then is too.
        self.shared = SharedTokens()
        # The packed segments by name, in the operations' order.
        self.pairs: dict[str, PackedPair] = {}
        self.cursor: Tensor | None = None
        # Position of text slot 0, as the cursor has it: no step changes it.
        self.origin = 0
        self.tiers: LayerTiers | None = None
        # What the operations of a step are given, always of the tensors above (follow_tensors).
        self.flat: FlatState | None = None
        # Positions and rotations of its own, where the plan tells coarse tokens from fine ones; else empty.
        self.own_positions: list[Tensor] = []
        self.own_rotations: list[Tensor] = []
        # Of each stream with a shared basis: how it fitted this prompt, and how it would have where it was refitted.
        self.fits: dict[str, Fit] = {}
        self.refitted: dict[str, Fit] = {}
        # Updates so far: states of a step are what the layer holds until the next one.
        self.updates = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own list: tokens that all rows share are the same memory in both."""
        return vars(self) | {"flat": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.pairs:
            self.follow_tensors()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store `[B, H_kv, n, D]` tokens; K and V of every token held, in order, the new ones exact."""
        if torch.compiler.is_dynamo_compiling() and self.is_initialized:
            key = deinterleaved_keys(key_states, self.index.plan.rotation)
            self.append(key, value_states)
            return self.unpacked(key, value_states, self.index.capacity)
        return self.update_watched(key_states, value_states)[0]

    def update_watched(self, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor], list[WatchedPair]]:
        """As `update`, with what tells whether shared bases fit the new tokens."""
        self.updates += 1
        if not self.is_initialized or self.index.chunk is not None:
            return store(self, key, value)
        key = deinterleaved_keys(key, self.index.plan.rotation)
        self.append(key, value)
        step = StoredStep(self, key, value, self.index.length or self.index.capacity)
        # what is kept as it is gets the very attention of a dense cache
        return (step.states() if self.index.is_watched and not self.is_lossless() else step.decoded), []

    @property
    def packed(self) -> int:
        """First position of the tail."""
        return int(self.cursor[PACKED])

    def move_origin(self, origin: int) -> None:
        """Give text slot 0 another position (docs/architecture.md)."""
        self.cursor[ORIGIN].add_(origin - self.origin)
        self.origin = origin

    @property
    def text_slots(self) -> int:
        """Text slots, free ones included."""
        return self.pairs["text"].slots

    @property
    def codes(self) -> list[Tensor]:
        """Codes of the packed segments in the operations' order, keys' before values' of each."""
        return [stream.codes for pair in self.pairs.values() for stream in pair.streams]

    def append(self, key: Tensor, value: Tensor) -> None:
        """Store a few new tokens `[B, H_kv, n, D]`, keys deinterleaved."""
        fits = key.shape[2]
        if self.index.window is not None and fits > 1 and not torch.compiler.is_dynamo_compiling():
            fits = self._fits_before_slot_0(fits)
        self._append(key[:, :, :fits], value[:, :, :fits])
        if fits < key.shape[2]:
            self.move_origin(self.origin + self.text_slots)
            self._append(key[:, :, fits:], value[:, :, fits:])

    def _fits_before_slot_0(self, tokens: int) -> int:
        """How many of `tokens` new tokens push none into text slot 0 again."""
        held, packed = self.index.begun
        end = self.origin + self.text_slots
        return min(tokens, end + self.tail.slots - held) if packed < end < self.index.assigned else tokens

    def _append(self, key: Tensor, value: Tensor) -> None:
        torch.ops.apack.append.default(key, value, *self.flat.to_append())

    def unpacked(self, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V `[B, H_kv, tokens, D]` of every token held, the new ones exact; `key` deinterleaved, K as the model has them."""
        return torch.ops.apack.unpack.default(key, value, *self.flat, tokens, *self.tier_state())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention `[B, H_q, rows, D]` over every token held, the new ones exact; with tiers, over those that a step reads."""
        query = deinterleaved_keys(query.to(key.dtype), self.index.plan.rotation)
        if self.reads_tiers and self.index.is_draft and key.shape[2] > 1:
            return self._attend_of_draft(query, key, value, mask, scale)
        arguments = query, key, value, mask, *self.flat, scale
        if self.reads_tiers:
            return torch.ops.apack.attend_tiers.default(*arguments, *self.tier_state())
        return torch.ops.apack.attend.default(*arguments)

    def _attend_of_draft(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """The same of several drafted tokens: the first one stays, and its attention alone counts for the importance."""
        tokens = key.shape[2]
        # heads may come as rows
        first = query.unflatten(2, (-1, tokens))[:, :, :, 0]
        seen = mask if mask is None or mask.shape[2] == 1 else mask.unflatten(2, (-1, tokens))[:, :, :, 0]
        before = [known.clone() for known in self.tiers.importance]
        given = query, key, value, mask, *self.flat, scale
        out = torch.ops.apack.attend_tiers.default(*given, *self.tier_state())
        for known, old in zip(self.tiers.importance, before, strict=True):
            known.copy_(old)
        earlier = self.cursor.clone()
        earlier[HELD] -= tokens - 1
        state = replace(self.state(), cursor=earlier)
        one = first, key[:, :, :1], value[:, :, :1], seen, *state.flatten(), scale
        torch.ops.apack.attend_tiers.default(*one, *self.tier_state())
        return out

    def state(self) -> PackedState:
        """What a step reads, for the operations: every tensor of a segment without slots would cost a call its time."""
        return self.state_at(self.positions(), self.rotations(), self.cursor, every=self.reads_tiers)

    def state_at(self, positions: list[Tensor], rotations: list[Tensor], cursor: Tensor, every: bool) -> PackedState:
        """The state with its slots at these positions; every: segments without slots too. rotations: empty for keys as they come."""
        segments = [
            Segment(pair.kind, pair.key, pair.value, where, rotations)
            for pair, where, rotations in zip(
                self.pairs.values(), positions[1:], rotations or NO_ROTATIONS, strict=False
            )
            if every or pair.kind == TEXT or pair.slots
        ]
        return self._state([*self.shared.segments, *segments], positions[0], len(rotations) > 0, cursor)

    def _state(self, segments: list[Segment], first: Tensor, is_rotated: bool, cursor: Tensor) -> PackedState:
        rotation = self.index.plan.rotation
        block, pairs = rotation.block if is_rotated else 0, 0 if rotation is None else rotation.interleaved_pairs
        return PackedState(tuple(segments), self.first, first, self.tail, cursor, block, pairs)

    def positions(self) -> list[Tensor]:
        """Positions of the slots: int32 `[B, slots]` of first, vision, text."""
        return self.tiers.positions if self.tiers is not None else self.own_positions or self.index.positions

    def rotations(self) -> list[Tensor]:
        """Rotations of the slots of vision and text; empty where keys are not rotated back."""
        return self.own_rotations or self.index.rotations

    def tier_state(self) -> tuple:
        """The last arguments of `unpack` and `attend_tiers`; empty without tiers, and where a step reads all tokens."""
        return self.tiers.state(self.pairs["vision"].value.bands.components) if self.reads_tiers else ()

    @property
    def reads_tiers(self) -> bool:
        """Whether a step reads some tokens in part, or changes their importance."""
        return self.tiers is not None and not self.tiers.rule.reads_all

    def check(self, key: Tensor, value: Tensor) -> None:
        """Raise ValueError for states that do not fit what the layer holds, or cannot be packed."""
        if self.is_initialized:
            for name, got, want in (
                ("batch size", key.shape[0], self.batch_size),
                ("number of KV heads", key.shape[1], self.num_heads),
                ("head_dim", key.shape[3], self.first.key.shape[3]),
                ("head_dim of values", value.shape[3], self.first.value.shape[3]),
                ("dtype", key.dtype, self.dtype),
                ("device", key.device, self.device),
            ):
                if got != want:
                    raise ValueError(
                        f"layer {self.layer_idx}: {name} is {got}, but this cache holds {want}; use a new cache"
                    )

    def dense_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of dense tokens: the model's, 16 bits where the plan is lossy."""
        return dtype if self.is_lossless() or dtype.itemsize == 2 else torch.float16

    def stream_plan(self, segment: str, name: str) -> StreamPlan:
        """How a stream of a packed segment is stored."""
        return getattr(self.index.plan.layers[self.layer_idx], f"{segment}_{name}")

    def is_lossless(self) -> bool:
        """Whether the plan keeps tokens as they are."""
        return self.index.plan is not None and self.index.plan.layers[self.layer_idx].text_key.scope == "as_is"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """What states `[B, H_kv, n, D]` say of those to come."""
        rows, heads = key_states.shape[:2]
        self.hold(self.index.chunk.offered, rows, heads, key_states.dtype, key_states.device)
        if self.index.plan.tiers is not None and self.tiers is None:
            self.tiers = LayerTiers(self.index.plan.tiers, self.batch_size, self.device)

    def hold(
        self, offered: tuple[Tensor, Tensor], rows: int, heads: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """From now on, states of so many rows and heads; offered: K and V of no tokens."""
        self.dtype, self.device = dtype, device
        self.batch_size, self.num_heads = rows, heads
        self.dense_dtype = self.dense_dtype_of(dtype)
        # Models look at these to see whether a layer is filled; who would read numbers gets an error.
        self.keys, self.values = offered
        self.is_initialized = True

    def follow_positions(self) -> None:
        """Rotations of its own slots as they are now."""
        rotation = self.index.plan.rotation
        if rotation is not None:
            self.own_rotations = [
                rotations_of_blocks(p, self.index.coordinates, rotation) for p in self.own_positions[1:]
            ]

    def grow(self, slots: int) -> None:
        """Add empty text slots for tokens to come; a per-sequence layer has its tail instead."""
        if not self.index.plan.per_request:
            start = self.text_slots + self.origin
            if self.tiers is not None:
                self.tiers.grow(start, slots)
            if self.own_positions:
                self.own_positions[-1] = extended(self.own_positions[-1], start, slots)
                self.follow_positions()
            self.pairs["text"] = self.pairs["text"].with_more_slots(slots)
        self.follow_tensors()

    def packed_tensors(self) -> list[Tensor]:
        """Codes and token scales of its rows."""
        return [x for pair in self.pairs.values() for x in pair.tensors]

    def dense_tensors(self) -> list[Tensor]:
        """First and newest tokens."""
        return [self.first.key, self.first.value, self.tail.key, self.tail.value]

    def basis_tensors(self) -> list[Tensor]:
        """Bases, shared ones too."""
        streams = [pair.streams for pair in self.pairs.values()] + [segment.streams for segment in self.shared.segments]
        return [x for both in streams for stream in both for x in stream.basis]

    def follow_tensors(self) -> None:
        """After tensors were made anew: what the operations are given now; compiled steps may count on those addresses.

        A step that is traced reads one list of each layer: what it would read of objects is checked before every step.
        """
        self.flat = self.state().flatten()
        self._mark_static()

    def _mark_static(self) -> None:
        """Tell the compiler that these tensors keep their addresses while their number of slots may differ."""
        own = self.tiers.tensors() if self.tiers is not None else ()
        placed = (*self.own_positions, *self.own_rotations)
        dense, packed, bases = self.dense_tensors(), self.packed_tensors(), self.basis_tensors()
        for tensor in (*dense, *packed, *bases, self.cursor, *placed, *own):
            torch._dynamo.mark_static_address(tensor, guard=False)
        for tensor in placed:
            if tensor.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        for tensor in own:
            if tensor.dim() > 1 and tensor.shape[1] > 2:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        self.shared.mark_static()
        for tensor in (self.first.key, self.first.value, *packed):
            if tensor.dim() > 1 and tensor.shape[2] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def keep_text(self, kept: Tensor, packed: int) -> None:
        """Leave only the text slots `kept` `[N]`, in this order; the newest packed token, before position `packed`, is in the last one."""
        self.pairs["text"] = self.pairs["text"].with_tokens(lambda x: x.index_select(2, kept))
        self.move_origin(packed - len(kept))

    def free_slots(self) -> int:
        """Tokens that can be appended before the layer must grow or be packed anew."""
        held, packed, _ = self.cursor.tolist()
        room = self.tail.slots - (held - packed)
        return room if self.index.plan.per_request else room + self.text_slots - (packed - self.origin)

    def get_seq_length(self) -> Tensor | int:
        """Tokens held: 0, or a 0-d tensor (a Python int would recompile at every step) that updates do not change."""
        return self.cursor[HELD].clone() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` returns for `query_length` new tokens."""
        if not self.is_initialized:
            return query_length, 0
        if torch.compiler.is_dynamo_compiling() or query_length <= MAX_APPEND:
            return self.index.capacity, 0
        return self.mask_sizes(int(self.cursor[HELD]), query_length)

    def mask_sizes(self, held: int, query_length: int) -> tuple[int, int]:
        """The same of a chunk that is laid out behind `held` tokens."""
        if torch.compiler.is_dynamo_compiling() or query_length <= MAX_APPEND:
            return self.index.capacity, 0
        window = self.index.window
        offset = 0 if window is None else max(held - window + 1, 0)
        return held - offset + query_length, offset

    def get_max_length(self) -> int:
        """-1: the layer grows."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget every token."""
        self.first = self.tail = self.cursor = self.tiers = self.flat = None
        self.origin = 0
        self.pairs, self.shared = {}, SharedTokens()
        self.own_positions, self.own_rotations = [], []
        self.fits, self.refitted = {}, {}
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the cache has checked that they came after the last layout."""
        held = self.cursor[HELD] - abs(tokens_to_remove)
        self.cursor[HELD] = held
        self.cursor[PACKED] = torch.minimum(self.cursor[PACKED], held)
        if self.tiers is not None:
            self.tiers.crop(int(held))

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to every tensor that has a row per sequence."""
        own_bases = any(stream.scope == "sequence" for stream in self.index.plan.layers[self.layer_idx].streams)
        self.pairs = {name: pair.with_rows(change, own_bases) for name, pair in self.pairs.items()}
        self.tail = DenseSegment(change(self.tail.key), change(self.tail.value))
        if self.index.prefix is None:
            self.first = DenseSegment(change(self.first.key), change(self.first.value))
        for tensors in (self.own_positions, self.own_rotations):
            tensors[:] = map(change, tensors)
        if self.tiers is not None:
            self.tiers.change_rows(change)
        self.batch_size = self.tail.key.shape[0]

    @property
    def has_evicted(self) -> bool:
        """Whether tokens were dropped."""
        return self.tiers is not None and self.tiers.has_evicted

    @torch.no_grad()
    def observe_draft(self, attention: Tensor) -> None:
        """After a chunk that is all draft: add its first token's `attention` `[B, T]` to the importance before it, and rank."""
        self.tiers.observe_draft(attention)
        self.rank()
        self.tiers.settled = True

    @torch.no_grad()
    def rank(self) -> None:
        """Put the vision tokens in the order of their importance, in place unless they were laid out just now."""
        self.pairs["vision"] = self.tiers.rank(self.pairs["vision"])
        self.follow_tensors()

    @torch.no_grad()
    def evict(self, pools: Sequence[tuple[str, ...]], end: int) -> Floor | None:
        """Evict tokens of these pools, text before position `end` alone, none of it in the tail.

        Gives the first position that can be cropped after it; None for any.
        """
        floor = evict(self, pools, end)
        self.follow_tensors()
        return floor
