"""One layer of the packed cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from apack_compile.cache.drift import Fit, lost_share, refit
from apack_compile.cache.layer_tiers import LayerTiers
from apack_compile.cache.shared_index import SharedIndex
from apack_compile.cache.stored_states import StoredStep
from apack_compile.cache.token_index import Kept, count_of, extended, flags_at, gather_tokens, kept_slots, positions_of
from apack_compile.kernels.cursor import HELD, ORIGIN, PACKED
from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import FLOAT16_MAX, StreamBasis
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.state import KIND_NAMES, TEXT, VISION, DenseSegment, PackedState, PackedStream, Segment
from apack_compile.kernels.turns import turned, turns_of_slots
from apack_compile.models.modality import compact
from apack_compile.plan.basis import fit, fit_steps, moments
from apack_compile.plan.importance import NEWEST, least_important, scores_of
from apack_compile.plan.plan import FITTED_SCOPES, STREAMS
from apack_compile.plan.rotation import deinterleaved_keys, turns_of_blocks

# A chunk of at most this many tokens is appended, not laid out anew; its attention sees the whole capacity.
MAX_APPEND = 32
# Fewer tokens do not tell whether a basis fits.
MIN_WATCHED = 32


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
        # Keys and values of each packed segment, as the plan has them, and these segments' kinds.
        self.streams: list[PackedStream] = []
        self.kinds: tuple[int, ...] = ()
        self.cursor: Tensor | None = None
        self.tiers: LayerTiers | None = None
        # Positions and turns of its own, where the plan tells coarse tokens from fine ones; else empty.
        self.own_positions: list[Tensor] = []
        self.own_turns: list[Tensor] = []
        # Of each stream with a shared basis: how it fitted this prompt, and how it would have where it was refitted.
        self.fits: dict[int, Fit] = {}
        self.refitted: dict[int, Fit] = {}
        # Bases of a sequence while they are fitted anew.
        self.earlier_bases: list[StreamBasis] = []
        # Updates so far: states of a step are what the layer holds until the next one.
        self.updates = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store `[B, H_kv, n, D]` tokens; K and V of every token held, in order, the new ones exact."""
        if torch.compiler.is_dynamo_compiling() and self.is_initialized:
            key = deinterleaved_keys(key_states, self.index.plan.turn)
            self.append(key, value_states)
            return self.unpacked(key, value_states, self.index.capacity)
        self.updates += 1
        if not self.is_initialized or self.index.chunk is not None:
            return self._store(key_states, value_states)
        key = deinterleaved_keys(key_states, self.index.plan.turn)
        self.append(key, value_states)
        step = StoredStep(self, key, value_states, self.index.length or self.index.capacity)
        # what is kept as it is gets the very attention of a dense cache
        return step.states() if self.index.is_watched and not self._lossless() else step.decoded

    @property
    def packed(self) -> int:
        """First position of the tail."""
        return int(self.cursor[PACKED])

    @property
    def origin(self) -> int:
        """Position of text slot 0 (docs/architecture.md)."""
        return int(self.cursor[ORIGIN])

    @property
    def text_slots(self) -> int:
        """Text slots, free ones included."""
        return self.streams[-1].codes.shape[2]

    def append(self, key: Tensor, value: Tensor) -> None:
        """Store a few new tokens `[B, H_kv, n, D]`, keys deinterleaved."""
        fits = key.shape[2]
        if self.index.window is not None and fits > 1 and not torch.compiler.is_dynamo_compiling():
            fits = self._fits_before_slot_0(fits)
        self._append(key[:, :, :fits], value[:, :, :fits])
        if fits < key.shape[2]:
            self.cursor[ORIGIN] += self.text_slots
            self._append(key[:, :, fits:], value[:, :, fits:])

    def _fits_before_slot_0(self, tokens: int) -> int:
        """How many of `tokens` new tokens push none into text slot 0 again."""
        held, packed, origin = self.cursor.tolist()
        end = origin + self.text_slots
        return min(tokens, end + self.tail.slots - held) if packed < end < self.index.assigned else tokens

    def _append(self, key: Tensor, value: Tensor) -> None:
        text = self._state(self.positions(), self.turns(), self.cursor, [len(self.kinds) - 1])
        torch.ops.apack.append.default(key, value, *text.to_append())

    def unpacked(self, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V `[B, H_kv, tokens, D]` of every token held, the new ones exact; `key` deinterleaved, K as the model has them."""
        return torch.ops.apack.unpack.default(key, value, *self.state().flatten(), tokens, *self.tier_state())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention `[B, H_q, rows, D]` over every token held, the new ones exact; with tiers, over those that a step reads."""
        query = deinterleaved_keys(query.to(key.dtype), self.index.plan.turn)
        state = self.state()
        if self.reads_tiers and self.index.is_draft and key.shape[2] > 1:
            return self._attend_of_draft(query, key, value, mask, state, scale)
        arguments = query, key, value, mask, *state.flatten(), scale
        if self.reads_tiers:
            return torch.ops.apack.attend_tiers.default(*arguments, *self.tier_state())
        return torch.ops.apack.attend.default(*arguments)

    def _attend_of_draft(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, state: PackedState, scale: float
    ) -> Tensor:
        """The same of several drafted tokens: the first one stays, and its attention alone counts for the importance."""
        tokens = key.shape[2]
        # heads may come as rows
        first = query.unflatten(2, (-1, tokens))[:, :, :, 0]
        seen = mask if mask is None or mask.shape[2] == 1 else mask.unflatten(2, (-1, tokens))[:, :, :, 0]
        before = [known.clone() for known in self.tiers.importance]
        given = query, key, value, mask, *state.flatten(), scale
        out = torch.ops.apack.attend_tiers.default(*given, *self.tier_state())
        for known, old in zip(self.tiers.importance, before, strict=True):
            known.copy_(old)
        earlier = replace(state, cursor=state.cursor - torch.tensor([tokens - 1, 0, 0], device=state.cursor.device))
        one = first, key[:, :, :1], value[:, :, :1], seen, *earlier.flatten(), scale
        torch.ops.apack.attend_tiers.default(*one, *self.tier_state())
        return out

    def state(self) -> PackedState:
        """What a step reads, for the operations: every tensor of a segment without slots would cost a call its time."""
        pairs = list(zip(self.streams[::2], self.streams[1::2], strict=True))
        last = len(pairs) - 1
        read = [i for i, (key, _) in enumerate(pairs) if i == last or self.reads_tiers or key.codes.shape[2]]
        return self._state(self.positions(), self.turns(), self.cursor, read)

    def _state(
        self, positions: list[Tensor], turns: list[Tensor], cursor: Tensor, segments: Sequence[int]
    ) -> PackedState:
        """The state of these packed segments, with first and tail; turns: empty for keys as they come."""
        turn = self.index.plan.turn
        packed = [
            Segment(
                self.kinds[i],
                self.streams[2 * i],
                self.streams[2 * i + 1],
                positions[1 + i],
                turns[i] if turns else None,
            )
            for i in segments
        ]
        block = turn.block if turns else 0
        pairs = 0 if turn is None else turn.interleaved_pairs
        return PackedState(tuple(packed), self.first, positions[0], self.tail, cursor, block, pairs)

    def positions(self) -> list[Tensor]:
        """Positions of the slots: int32 `[B, slots]` of first, vision, text."""
        return self.tiers.positions if self.tiers is not None else self.own_positions or self.index.positions

    def turns(self) -> list[Tensor]:
        """Turns of the slots of vision and text; empty where keys are not turned back."""
        return self.own_turns or self.index.turns

    def tier_state(self) -> tuple:
        """The last arguments of `unpack` and `attend_tiers`; empty without tiers, and where a step reads all tokens."""
        return self.tiers.state(self.streams[1].bands.components) if self.reads_tiers else ()

    @property
    def reads_tiers(self) -> bool:
        """Whether a step reads some tokens in part, or changes their importance."""
        return self.tiers is not None and not self.tiers.rule.reads_all

    @torch.compiler.disable
    def _store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Lay a chunk out in segments; K and V as `update` returns them."""
        key, value = key.detach(), value.detach()
        fresh = not self.is_initialized
        if fresh:
            self.lazy_initialization(key, value)
        held, packed, origin = self.cursor.tolist()
        end = held + key.shape[2]
        given, key = key, deinterleaved_keys(key, self.index.plan.turn)
        out, offset = ((given, value), 0) if fresh else self._exact(key, value)
        if self.index.plan.per_request:
            self.earlier_bases = [] if fresh else [stream.basis for stream in self.streams]
            self.lazy_initialization(key, value)
            parts, used = [states[:, :, :end] for states in out], [0] * len(self.index.plan.segments)
        else:
            parts = [self._tail_then(states, i, held, packed) for i, states in enumerate((key, value))]
            used = self.index.kept or [*(key.codes.shape[2] for key in self.streams[:-2:2]), packed - origin]
        self._lay_out(parts, used, end)
        self.earlier_bases = []
        return (out[0][:, :, offset:], out[1][:, :, offset:]) if offset else out

    def recompact(self) -> None:
        """Pack the tail: lay everything out anew with an empty chunk."""
        batch, heads, _, key_dim = self.first.key.shape
        none = torch.empty(batch, heads, 0, key_dim, dtype=self.dtype, device=self.device)
        known = None if self.tiers is None else self.tiers.vision_importance(int(self.cursor[HELD]))
        was_settled = self.tiers is not None and self.tiers.settled
        self._store(none, none.new_empty(batch, heads, 0, self.first.value.shape[3]))
        if was_settled:
            self.tiers.observe(known)
            self.rank()
            self.tiers.settled = True

    def _exact(self, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
        """What is held, decoded, with the chunk exact at its end; the position from which on `update` returns it."""
        held = self.cursor + torch.tensor([key.shape[2], 0, 0], device=key.device)
        length, offset = (self.index.length, 0) if self.index.length else self.get_mask_sizes(key.shape[2])
        tokens = max(offset + length, int(held[HELD]))
        positions = self.positions() if self.index.plan.layers_place_tokens else self.index.laid_out
        turns = self.own_turns or self.index.laid_out_turns
        state = self._state(positions, turns, held, range(len(self.kinds)))
        return torch.ops.apack.unpack.default(key, value, *state.flatten(), tokens), offset

    def check(self, key: Tensor, value: Tensor) -> None:
        """Raise ValueError for states that cannot be packed."""
        for name, states in zip(STREAMS, (key, value), strict=True):
            states = states.detach() if states.numel() else states.new_zeros(1)
            largest = torch.maximum(states.amax(), -states.amin())
            if not torch.isfinite(largest):
                raise ValueError(f"layer {self.layer_idx}: {name} states hold NaN or Inf; the cache was left as it was")
            lossy = self.index.plan is not None and not self._lossless()
            if states.dtype.itemsize > 2 and largest > FLOAT16_MAX and lossy:
                raise ValueError(
                    f"layer {self.layer_idx}: {name} states reach {float(largest):.3g}, past float16's {FLOAT16_MAX:.0f}; "
                    'use preset="lossless", or run the model in bfloat16'
                )

    def _dense_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of dense tokens: the model's, 16 bits where the plan is lossy."""
        return dtype if self._lossless() or dtype.itemsize == 2 else torch.float16

    def _lossless(self) -> bool:
        """Whether the plan keeps tokens as they are."""
        return self.index.plan is not None and self.index.plan.layers[self.layer_idx].text_key.scope == "as_is"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty segments for states `[B, H_kv, n, D]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        dense_dtype = self._dense_dtype(self.dtype)
        tail = self.index.plan.tail_slots
        given = key_states, value_states
        self.first, self.tail = (
            DenseSegment(*(x.new_zeros((*x.shape[:2], slots, x.shape[3]), dtype=dense_dtype) for x in given))
            for slots in (0, tail)
        )
        self.kinds = tuple(map(KIND_NAMES.index, self.index.plan.segments))
        self.streams = []
        for i, plan in enumerate(self.index.plan.layers[self.layer_idx].streams):
            x = to_groups(given[i % 2][:, :, :0], self.index.plan.groups)
            basis = self._initial_basis(i, given[i % 2])
            codes, _ = encode(x, basis, plan.bands)
            codes = codes.to(dense_dtype) if plan.scope == "half" else codes
            scale = x.new_empty((*x.shape[:3],) if plan.token_scale else 0, dtype=torch.float16)
            self.streams.append(PackedStream(codes, scale, basis, plan.bands))
        self.cursor = torch.zeros(3, dtype=torch.int64, device=self.device)
        # Models look at these to see whether a layer is filled; who would read numbers gets an error.
        self.keys, self.values = (x[:, :, :0].to("meta") for x in (key_states, value_states))
        if self.index.plan.tiers is not None and self.tiers is None:
            self.tiers = LayerTiers(self.index.plan.tiers, self.batch_size, self.device)
        self.is_initialized = True

    def _initial_basis(self, stream: int, states: Tensor) -> StreamBasis:
        """The basis before any token is packed: the plan's, the identity, or zeros that the first fit replaces."""
        plan = self.index.plan.layers[self.layer_idx].streams[stream]
        if plan.scope == "model":
            return self.index.plan.bases[self.layer_idx][stream]
        empty = states.new_empty(0, dtype=torch.float32)
        if plan.scope in ("as_is", "half"):
            return StreamBasis(empty, empty, empty)
        batch, groups = 1 if plan.scope == "batch" else states.shape[0], self.index.plan.groups
        width = states.shape[1] * states.shape[3] // groups
        rank = plan.bands.components
        shape = (batch, groups, rank, width)
        half = {"dtype": torch.float16, "device": states.device}
        return StreamBasis(
            torch.zeros(batch, groups, width, **half), torch.zeros(shape, **half), empty.new_ones(shape[:3])
        )

    def _pack(self, states: Tensor, stream: int, index: Tensor, first_slot: int) -> tuple[Tensor, Tensor]:
        """Codes and token scales of chunk states `[B, H_kv, n, D]` at `index` `[B, N]`, for the slots from `first_slot` on.

        A basis of a sequence or batch is fitted on the way.
        """
        plan = self.index.plan.layers[self.layer_idx].streams[stream]
        tokens = gather_tokens(states, index)
        if stream % 2 == 0 and self.turns():
            slots = torch.arange(first_slot, first_slot + tokens.shape[2], device=tokens.device)
            turns = turns_of_slots(self.turns()[stream // 2], self.index.plan.turn.block, slots)[:, None]
            tokens = turned(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), turns, back=True)
        x = to_groups(tokens, self.index.plan.groups)
        bands = plan.bands
        if plan.scope in FITTED_SCOPES:
            sample, real = x, index >= 0
            if plan.scope == "batch":
                sample, real = x.transpose(0, 1).flatten(1, 2)[None], real.reshape(1, -1)
            bands = bands.at_most(sample.shape[2])
            spectrum = fit(moments(sample, real.to(torch.float32)), bands.components, self._earlier_rows(stream))
            if not all(band.is_float for count, band in bands.parts if count):
                # a Gaussian's steps clip a sequence's outliers, which costs more than all else
                spectrum = fit_steps(spectrum, sample, token_scale=False)
            self.streams[stream] = replace(
                self.streams[stream], basis=spectrum.basis(bands, torch.float16), bands=bands
            )
        if plan.scope == "model":
            self._watch_fit(x, index >= 0, stream)
        codes, scale = encode(x, self.streams[stream].basis, bands, plan.token_scale)
        return (codes.to(self.streams[stream].codes.dtype) if plan.scope == "half" else codes), scale

    def _earlier_rows(self, stream: int) -> Tensor | None:
        """Rows of the stream's basis before this chunk; None where there was none."""
        rows = self.earlier_bases[stream].decoder if self.earlier_bases else None
        return rows if rows is not None and bool(rows.any()) else None

    def _watch_fit(self, x: Tensor, real: Tensor, stream: int) -> None:
        """Measure how well a shared basis codes tokens `[B, G, N, W_g]`; refit a bad one while nothing is stored with it."""
        plan = self.index.plan.layers[self.layer_idx].streams[stream]
        if plan.bands.components == 0 or int(real.sum()) < MIN_WATCHED:
            return
        basis = self.streams[stream].basis
        fitted = Fit(lost_share(x, real, basis, plan.bands, plan.token_scale), plan.expected_error)
        if fitted.is_bad and self.streams[stream].codes.shape[2] == 0:
            again = refit(x, real, plan.bands, basis)
            after = Fit(lost_share(x, real, again, plan.bands, plan.token_scale), plan.expected_error)
            if after.found < fitted.found:
                self.streams[stream] = replace(self.streams[stream], basis=again)
                self.refitted[stream] = fitted
                fitted = after
        self.fits[stream] = fitted

    def _tail_then(self, states: Tensor, stream: int, held: int, packed: int) -> Tensor:
        """The tail's tokens, in order, then the chunk's."""
        tail = (self.tail.key, self.tail.value)[stream]
        ring = torch.arange(packed, held, device=states.device) % max(self.tail.slots, 1)
        return torch.cat([tail[:, :, ring].to(states.dtype), states], dim=2)

    def _lay_out(self, parts: list[Tensor], used: list[Kept], end: int) -> None:
        """Put the tokens of `parts` (K, V) where the shared assignment says, behind the `used` slots of each segment."""
        assignment, tiers = self.index.assignment, self.tiers
        where = [assignment.vision, assignment.text]
        if self.index.plan.coarse is not None:
            where = self._told_apart(parts)
            self._place(where, used)
        if tiers is not None and self.index.plan.per_request:
            alive = tiers.alive(end)
            where = [torch.where(alive.gather(1, i.clamp_min(0)), i, -1) for i in where]
        first = [gather_tokens(states, assignment.first).to(self.first.key.dtype) for states in parts]
        self.first = DenseSegment(*map(torch.cat, zip((self.first.key, self.first.value), first, strict=True), (2, 2)))
        for i in range(2 * len(where)):
            segment = i // 2
            codes, scale = self._pack(parts[i % 2], i, where[segment], count_of(used[segment]))
            stream = self.streams[i]
            if not self.index.plan.per_request:
                codes = torch.cat([kept_slots(stream.codes, used[segment], 2), codes], dim=2)
                scale = (
                    torch.cat([kept_slots(stream.scale, used[segment], 2), scale], dim=2) if scale.dim() > 1 else scale
                )
            self.streams[i] = replace(stream, codes=codes, scale=scale if scale.dim() > 1 else stream.scale)
        start = end - assignment.tail
        ring = torch.arange(start, end, device=self.device) % max(self.tail.slots, 1)
        newest = [x[:, :, x.shape[2] - assignment.tail :].to(self.tail.key.dtype) for x in parts]
        key, value = self.tail.key, self.tail.value
        self.tail = DenseSegment(key.index_copy(2, ring, newest[0]), value.index_copy(2, ring, newest[1]))
        self.cursor = torch.tensor([end, start, start - self.text_slots], device=self.device)
        if tiers is not None:
            if self.index.plan.per_request:
                tiers.lay_out(self.index.positions, dict(zip((VISION, TEXT), where, strict=True)), end)
            else:
                tiers.add_chunk(
                    self.index.positions, dict(zip((VISION, TEXT), used, strict=True)), end - parts[0].shape[2], end
                )
        self.grow(self.index.spare)

    def _told_apart(self, parts: list[Tensor]) -> list[Tensor]:
        """Where a chunk's tokens go, chunk indices `[B, slots]` per packed segment; the newest text is fine."""
        plan, chunk, assignment = self.index.plan, self.index.chunk, self.index.assignment
        tokens, recent = parts[0].shape[2], assignment.recent - assignment.tail
        older, newest = assignment.text.split([assignment.text.shape[1] - recent, recent], dim=1)
        column = torch.arange(tokens, device=older.device)
        candidates = flags_at(assignment.vision if plan.coarse.modality == "vision" else older, tokens)
        candidates &= column < tokens - NEWEST
        coordinates = self.index.coordinates.at((chunk.start + column).expand(len(older), -1))
        scores = scores_of(parts[0], parts[1], coordinates, plan.turn, plan.coarse.weights[self.layer_idx])
        coarse = least_important(candidates, scores, plan.coarse.share)
        if plan.coarse.modality == "vision":
            return [compact(coarse), compact(flags_at(assignment.vision, tokens) & ~coarse), assignment.text]
        return [compact(coarse), assignment.vision, torch.cat([compact(flags_at(older, tokens) & ~coarse), newest], 1)]

    def _place(self, where: list[Tensor], used: list[int]) -> None:
        """Positions and turns of a chunk's tokens, behind those of the `used` slots."""
        new = [positions_of(i, self.index.chunk.start) for i in (self.index.assignment.first, *where)]
        if self.own_positions:
            first, *packed = self.own_positions
            old = [first, *(p[:, :slots] for p, slots in zip(packed, used, strict=True))]
            new = [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
        self.own_positions = new
        self._follow_positions()

    def _follow_positions(self) -> None:
        """Turns of its own slots as they are now."""
        turn = self.index.plan.turn
        if turn is not None:
            self.own_turns = [turns_of_blocks(p, self.index.coordinates, turn) for p in self.own_positions[1:]]

    def grow(self, slots: int) -> None:
        """Add empty text slots for tokens to come; a per-sequence layer has its tail instead."""
        if not self.index.plan.per_request:
            start = self.text_slots + int(self.cursor[ORIGIN])
            if self.tiers is not None:
                self.tiers.grow(start, slots)
            if self.own_positions:
                self.own_positions[-1] = extended(self.own_positions[-1], start, slots)
                self._follow_positions()
            self.streams[-2:] = [stream.with_tokens(lambda x: with_slots(x, slots)) for stream in self.streams[-2:]]
        self.mark_static()

    def packed_tensors(self) -> list[Tensor]:
        """Codes and token scales."""
        return tensors_of(self.streams)

    def dense_tensors(self) -> list[Tensor]:
        """First and newest tokens."""
        return [self.first.key, self.first.value, self.tail.key, self.tail.value]

    def basis_tensors(self) -> list[Tensor]:
        """Bases, shared ones too."""
        return [x for stream in self.streams for x in stream.basis]

    def mark_static(self) -> None:
        """Tell the compiler that these tensors keep their addresses while their number of slots may differ."""
        own = self.tiers.tensors() if self.tiers is not None else ()
        placed = (*self.own_positions, *self.own_turns)
        dense, packed, bases = self.dense_tensors(), self.packed_tensors(), self.basis_tensors()
        for tensor in (*dense, *packed, *bases, self.cursor, *placed, *own):
            torch._dynamo.mark_static_address(tensor, guard=False)
        for tensor in placed:
            if tensor.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        for tensor in own:
            if tensor.dim() > 1 and tensor.shape[1] > 2:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        for tensor in (self.first.key, self.first.value, *packed):
            if tensor.dim() > 1 and tensor.shape[2] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def keep_text(self, kept: Tensor) -> None:
        """Leave only the text slots `kept` `[N]`, in this order; the newest packed token is in the last one."""
        self.streams[-2:] = [stream.with_tokens(lambda x: x.index_select(2, kept)) for stream in self.streams[-2:]]
        self.cursor[ORIGIN] = self.cursor[PACKED] - len(kept)

    def free_slots(self) -> int:
        """Tokens that can be appended before the layer must grow or be packed anew."""
        held, packed, origin = self.cursor.tolist()
        room = self.tail.slots - (held - packed)
        return room if self.index.plan.per_request else room + self.text_slots - (packed - origin)

    def get_seq_length(self) -> Tensor | int:
        """Tokens held: 0, or a 0-d tensor (a Python int would recompile at every step) that updates do not change."""
        return self.cursor[HELD].clone() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` returns for `query_length` new tokens."""
        if not self.is_initialized:
            return query_length, 0
        if torch.compiler.is_dynamo_compiling() or query_length <= MAX_APPEND:
            return self.index.capacity, 0
        held, window = int(self.cursor[HELD]), self.index.window
        offset = 0 if window is None else max(held - window + 1, 0)
        return held - offset + query_length, offset

    def get_max_length(self) -> int:
        """-1: the layer grows."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget every token."""
        self.first = self.tail = self.cursor = self.tiers = None
        self.streams = []
        self.own_positions, self.own_turns = [], []
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
        for stream in range(len(self.streams) if self._own_bases() else 0):
            held = self.streams[stream]
            basis = StreamBasis(*(change(x) if x.dim() > 1 else x for x in held.basis))
            self.streams[stream] = replace(held, basis=basis)
        self.streams = [stream.with_tokens(change) for stream in self.streams]
        self.first, self.tail = (DenseSegment(change(x.key), change(x.value)) for x in (self.first, self.tail))
        own = [] if self.tiers is None else self.tiers.batched()
        for tensors in (self.own_positions, self.own_turns, *own):
            tensors[:] = map(change, tensors)
        self.batch_size = self.first.key.shape[0]

    def _own_bases(self) -> bool:
        """Whether each row has bases of its own."""
        return any(stream.scope == "sequence" for stream in self.index.plan.layers[self.layer_idx].streams)

    @property
    def has_evicted(self) -> bool:
        """Whether tokens were dropped."""
        return self.tiers is not None and self.tiers.has_evicted

    @torch.no_grad()
    def settle(self, importance: Tensor, settled: int) -> int:
        """After a prefill: take the `importance` `[B, T]` by position, evict, and rank; first position still croppable.

        settled: first position of the tokens that may be cropped again, of which none is evicted.
        """
        tiers = self.tiers
        tiers.observe(importance)
        floor = self.evict(tiers.rule.pools, settled)
        self.rank()
        tiers.settled = True
        self.mark_static()
        return floor

    @torch.no_grad()
    def observe_draft(self, attention: Tensor) -> None:
        """After a chunk that is all draft: add its first token's `attention` `[B, T]` to the importance before it, and rank."""
        self.tiers.observe_draft(attention)
        self.rank()
        self.tiers.settled = True
        self.mark_static()

    @torch.no_grad()
    def rank(self) -> None:
        """Put the vision tokens in the order of their importance, in place."""
        self.tiers.rank(tensors_of(self.streams[:2]))

    @torch.no_grad()
    def evict(self, pools: Sequence[tuple[str, ...]], settled: int) -> int:
        """Evict tokens of these pools, text before position `settled` alone; first position that can be cropped after it."""
        _, packed, origin = self.cursor.tolist()
        end = min(packed, settled)
        if any("text" in pool for pool in pools):
            self.tiers.count_text(end)
        keep = {name: flags for pool in pools for name, flags in self.tiers.chosen(pool, end - origin).items()}
        if "vision" in keep and keep["vision"].numel():
            self.streams[:2] = self.tiers.keep_vision(self.streams[:2], keep["vision"])
        return self._keep_text(keep["text"], end) if "text" in keep else 0

    def _keep_text(self, keep: Tensor, end: int) -> int:
        """Evict text before position `end`, in place where the slots stay as many; first position that can be cropped after it."""
        origin = int(self.cursor[ORIGIN])
        kept, croppable = self.tiers.keep_text(tensors_of(self.streams[2:]), keep, end)
        if not self.tiers.settled:
            slots = kept + self.text_slots - (end - origin)
            self.streams[2:] = [stream.with_tokens(lambda x: x[:, :, :slots].clone()) for stream in self.streams[2:]]
            self.tiers.keep_text_slots(slots)
        self.cursor[ORIGIN] = end - kept
        return end - croppable


def tensors_of(streams: Sequence[PackedStream]) -> list[Tensor]:
    """Codes and token scales of some streams."""
    return [x for stream in streams for x in (stream.codes, stream.scale)]


def with_slots(x: Tensor, slots: int) -> Tensor:
    """Codes or token scales with so many more slots, of zeros."""
    return torch.cat([x, x.new_zeros((*x.shape[:2], slots, *x.shape[3:]))], dim=2)
