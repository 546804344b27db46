"""The packed cache: a transformers `Cache` whose full-attention layers store compressed tokens."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from apack_compile.accounting import cache_report
from apack_compile.autocast import without_autocast
from apack_compile.backend import StrictError
from apack_compile.coordinates import TokenCoordinates, coordinates_of
from apack_compile.inference_mode import outside_inference_mode
from apack_compile.kept_layers import cannot_crop, has_linear_states, kept_layer, map_rows
from apack_compile.layer import MAX_APPEND, CompactedLayer
from apack_compile.packed_layers import packed_layer
from apack_compile.plan import Plan, spare_slots
from apack_compile.rotary import rotary_start, turns_of_blocks
from apack_compile.shared_index import SharedIndex
from apack_compile.token_index import Chunk, assign, extended, positions_of, without_bad_bargains
from apack_compile.watch import Watch, WatchedKeys

Planner = Callable[[int, float], Plan]
CAPACITY_GRAIN = 256


@dataclass(frozen=True)
class LayerKind:
    """What a layer of the model gets: `reason` is None when it is packed, else why it keeps transformers' own layer.

    compileable: whether a decode step over it can be compiled. has_keys: whether it holds keys and values of its own.
    """

    layer: int
    layer_type: str
    reason: str | None
    compileable: bool = True
    has_keys: bool = True


class CompactedCache(Cache):
    """Packed KV cache of one batch of sequences.

    kinds: one entry per layer of the model. own_layers: transformers' layers for those that are not packed. planner: gives the
    plan for a prompt of so many tokens, this share of them vision; asked once, at the first prefill. expected_tokens: new tokens
    to make room for from the start (the cache grows past it when it must). signature: what model it belongs to. strict: raise
    StrictError where tokens' rotary coordinates are needed and not shown. dtype: the model's, for states that come from torch.autocast.
    """

    def __init__(
        self,
        kinds: list[LayerKind],
        own_layers: DynamicCache,
        planner: Planner,
        expected_tokens: int = 64,
        signature: tuple = (),
        strict: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.index = SharedIndex()
        layers = [
            packed_layer(kind.layer, self.index, own_layers.layers[kind.layer] if own_layers.layers else None)
            if kind.reason is None
            else kept_layer(own_layers.layers[kind.layer], kind.layer_type)
            for kind in kinds
        ]
        super().__init__(layers=layers)
        self.kinds = kinds
        self.planner: Planner | None = planner
        self.expected_tokens = expected_tokens
        self.signature = signature
        self.strict = strict
        self.dtype = dtype
        self.notes: list[str] = []
        self._incoming: tuple[Tensor | None, Tensor | None] = (None, None)
        # Of the chunk being stored.
        self._padding: Tensor | None = None
        self.is_told = False
        # What the pass that runs gave its rotary embedding: `[C, B, n]` or `[B, n]`.
        self._shown: Tensor | None = None
        self._undo: Callable[[], None] | None = None
        # Layers that could not forget a chunk that failed.
        self._half_taken: list[int] = []
        self.history: tuple[Tensor, Tensor] | None = None
        # Where generate's prompt ends: tokens from there on are generated or drafted, never pictures.
        self.prompt_end: int | None = None
        # Chunks stored by eager forward passes, and how many of them when the one that runs began.
        self.eager_chunks = self.chunks_before = 0

    @property
    def packed_layers(self) -> list[CompactedLayer]:
        """The layers that store compressed tokens."""
        return [layer for layer in self.layers if isinstance(layer, CompactedLayer)]

    @property
    def is_filled(self) -> bool:
        """Whether a prompt has been stored."""
        return all(layer.is_initialized for layer in self.packed_layers)

    @property
    def croppable(self) -> int:
        """How many of the newest tokens `crop` can remove."""
        return int(self.packed_layers[0].get_seq_length()) - self.index.floor if self.is_filled else 0

    def note(self, text: str) -> None:
        """Something the report must say, once."""
        if text not in self.notes:
            self.notes.append(text)

    def expect(self, vision: Tensor | None, padding: Tensor | None) -> None:
        """Tell which tokens of the coming chunk are vision and which padding, bool `[B, n]`; None for none of them."""
        self._incoming, self.is_told, self._shown = (vision, padding), True, None

    def show_positions(self, positions: Tensor) -> None:
        """Tell what the model's rotary embedding is given for the coming chunk: `[C, B, n]` or `[B, n]`."""
        self._shown = positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the states of one layer; raises ValueError (cache unchanged) for states that cannot be packed."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompactedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if torch.is_autocast_enabled(key_states.device.type):
            dtype = self._dtype_of(layer, key_states, value_states)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if torch.compiler.is_dynamo_compiling() and layer.is_initialized:
            return layer.update(key_states, value_states)
        return self._update_eagerly(layer, key_states, value_states)

    def _dtype_of(self, layer: CompactedLayer, key: Tensor, value: Tensor) -> torch.dtype:
        """The dtype of a layer's states where autocast gives keys and values others."""
        if layer.is_initialized:
            return layer.dtype
        return reduce(torch.promote_types, (value.dtype, self.dtype or key.dtype), key.dtype)

    @torch.compiler.disable
    @outside_inference_mode
    @without_autocast
    def _update_eagerly(self, layer: CompactedLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Checked update of a layer, all or nothing over the layers of a chunk."""
        packed = self.packed_layers
        try:
            if layer is packed[0]:
                self._check(layer, key, value)
                self._begin(key)
            self._check(layer, key, value)
            out = layer.update(key, value)
        except Exception:
            self._roll_back()
            raise
        if layer.tiers is not None and self.index.chunk is not None and self.index.is_watched:
            out = WatchedKeys.of(out[0], Watch(self, layer, key.shape[2], self._padding)), out[1]
        if layer is packed[-1]:
            self._note_fits(packed)
            self._undo, self.index.laid_out, self.index.laid_out_turns = None, [], []
            self.index.chunk = self.index.assignment = self._padding = None
        return out

    def _note_fits(self, packed: list[CompactedLayer]) -> None:
        """Say which shared bases did not fit this prompt."""
        refitted = sum(len(layer.refitted) for layer in packed)
        bad = sum(fit.is_bad for layer in packed for fit in layer.fits.values())
        if refitted:
            self.note(
                f"{refitted} of {4 * len(packed)} shared bases did not fit this prompt: refitted, stored with the sequence"
            )
        if bad:
            self.note(
                f"{bad} of {4 * len(packed)} streams lose more than their calibration promised; calibrate on such inputs"
            )

    def _check(self, layer: CompactedLayer, key: Tensor, value: Tensor) -> None:
        """Raise ValueError unless the states fit what the cache holds and can be packed."""
        if self._half_taken:
            raise ValueError(
                f"the last chunk failed, and layers {', '.join(map(str, self._half_taken))} keep what they took of it: reset the cache, "
                "or use a new one"
            )
        if layer.is_initialized:
            for name, got, want in (
                ("batch size", key.shape[0], layer.batch_size),
                ("number of KV heads", key.shape[1], layer.num_heads),
                ("head_dim", key.shape[3], layer.dense[0].shape[3]),
                ("dtype", key.dtype, layer.dtype),
                ("device", key.device, layer.device),
            ):
                if got != want:
                    raise ValueError(
                        f"layer {layer.layer_idx}: {name} is {got}, but this cache holds {want}; use a new cache"
                    )
        layer.check(key, value)

    def _begin(self, key: Tensor) -> None:
        """Decide, at the first packed layer, what happens to the coming chunk `[B, H_kv, n, D]`."""
        batch, _, tokens, _ = key.shape
        self.eager_chunks += 1
        (vision, padding), shown = self._incoming, self._shown
        self._incoming, self._padding, self._shown, self.is_told = (None, None), padding, None, False
        first = self.packed_layers[0]
        held = int(first.get_seq_length())
        appends = held > 0 and tokens <= MAX_APPEND and not (vision is not None and bool(vision.any()))
        if appends:
            self.reserve(tokens)
        self._remember(appends)
        self.index.length = None if self.is_compileable else held + tokens
        if appends:
            self.index.chunk = self.index.assignment = None
            return
        none = torch.zeros(batch, tokens, dtype=torch.bool, device=key.device)
        vision, padding = (none if f is None or f.shape != none.shape else f.to(key.device) for f in (vision, padding))
        self._choose_plan(tokens, vision, padding)
        self._plan_chunk(vision, padding, shown, held, key.shape[1] * key.shape[3])

    def plan_for_prompt(self, tokens: int, vision_share: float) -> None:
        """Choose the plan of an empty cache now: the first chunk may not be the whole prompt."""
        self.index.plan = self.planner(tokens, vision_share)
        self.planner = None

    def _choose_plan(self, tokens: int, vision: Tensor, padding: Tensor) -> None:
        """Ask for the plan at the first prefill."""
        if self.index.plan is None:
            real = (~padding).sum().clamp_min(1)
            self.plan_for_prompt(tokens, float((vision & ~padding).sum() / real))

    def _plan_chunk(self, vision: Tensor, padding: Tensor, shown: Tensor | None, held: int, width: int) -> None:
        """Assign the chunk's tokens to slots and update the shared positions."""
        plan, index, first = self.index.plan, self.index, self.packed_layers[0]
        tokens = vision.shape[1]
        drafted = 0 if self.prompt_end is None else min(tokens, held + tokens - self.prompt_end)
        self._extend_coordinates(shown, padding, held)
        self._extend_history(held)
        if not plan.separates_vision and bool(vision.any()):
            self.note("the calibration inputs held no vision tokens: vision tokens are stored with the text bases")
            vision = torch.zeros_like(vision)
        packed, origin = (int(first.cursor[1]), int(first.cursor[2])) if held else (0, 0)
        if plan.per_request:
            if self.history is not None:
                past = (past[:, :held] for past in self.history)
                vision, padding = (torch.cat([old, new], 1) for old, new in zip(past, (vision, padding), strict=True))
            self.history = (vision, padding)
            index.chunk = Chunk(vision, padding, 0)
            index.assignment = without_bad_bargains(assign(index.chunk, plan.first_tokens, 0, drafted), plan, width)
            kept = [vision.new_empty((vision.shape[0], 0), dtype=torch.int32)] * 3
        else:
            waiting = held - packed
            if waiting:
                none = torch.zeros(vision.shape[0], waiting, dtype=torch.bool, device=vision.device)
                vision, padding = torch.cat([none, vision], 1), torch.cat([none, padding], 1)
            index.chunk = Chunk(vision, padding, packed)
            # a row whose first chunk was short, or mostly padding, still lacks first tokens
            found = (first.state()[4][0] >= 0).sum(1, keepdim=True) if held else 0
            index.assignment = assign(index.chunk, plan.first_tokens - found, plan.tail_slots, drafted)
            empty = vision.new_empty((vision.shape[0], 0), dtype=torch.int32)
            shared = held and not plan.layers_place_tokens
            kept = [*index.positions[:2], index.positions[2][:, : packed - origin]] if shared else [empty] * 3
        assignment = index.assignment
        index.spare = self._spare(held + tokens)
        start = held + tokens - assignment.tail
        index.floor = held + tokens - assignment.recent
        new = [positions_of(i, index.chunk.start) for i in (assignment.first, assignment.vision, assignment.text)]
        index.laid_out, index.laid_out_turns = index.positions, index.turns
        index.positions = [torch.cat(pair, 1) for pair in zip(kept, new, strict=True)]
        if plan.coarse is not None:
            index.positions = []
        elif not plan.per_request and plan.tiers is None:
            index.positions[2] = extended(index.positions[2], start, index.spare)
        self._follow_positions()
        # a chunk that `get_mask_sizes` took for an append keeps the capacity that it announced
        if tokens > MAX_APPEND or held + tokens > index.capacity:
            index.capacity = max(index.capacity, self._capacity(held + tokens))

    def _extend_coordinates(self, shown: Tensor | None, padding: Tensor, held: int) -> None:
        """Follow a chunk that begins at index `held` and whose rotary embedding was `shown` these positions; padding: bool `[B, n]`."""
        index, turn = self.index, self.index.plan.turn
        count = 1 if turn is None else turn.coordinate_count
        if not held:
            index.coordinates = TokenCoordinates.starting_at(rotary_start(padding), count)
        if not index.plan.has_coordinates:
            return
        shown = coordinates_of(shown, len(padding), padding.shape[1], count)
        if shown is None:
            text = (
                "a chunk's rotary coordinates were not seen (a prefill that is not eager?): its keys are turned back as if it "
                "were all text, and coded worse"
            )
            if self.strict:
                raise StrictError(f"strict: {text}")
            self.note(text)
            return
        index.coordinates = index.coordinates.followed_by(shown.to(padding.device), padding, held)

    def _spare(self, tokens: int) -> int:
        """Free text slots to keep when `tokens` tokens are held."""
        return max(16, min(self.expected_tokens, spare_slots(tokens)))

    def _capacity(self, tokens: int) -> int:
        """Logical length to offer when `tokens` tokens are held."""
        return -(-(tokens + max(self.expected_tokens, MAX_APPEND)) // CAPACITY_GRAIN) * CAPACITY_GRAIN

    def _follow_positions(self) -> None:
        """Turns of the slots as they are now."""
        index = self.index
        if index.plan.turn is not None:
            index.turns = [
                turns_of_blocks(positions, index.coordinates, index.plan.turn) for positions in index.positions[1:]
            ]
        self._mark_positions()

    def _mark_positions(self) -> None:
        """As the layers do with their tensors: static addresses, any number of slots."""
        for position in (*self.index.positions, *self.index.turns):
            torch._dynamo.mark_static_address(position, guard=False)
            if position.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(position, 1)

    @outside_inference_mode
    @without_autocast
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens: grow the storage, or pack a full tail."""
        packed = self.packed_layers
        if not packed or not packed[0].is_initialized:
            return
        held, index = int(packed[0].get_seq_length()), self.index
        if held + tokens > index.capacity:
            index.capacity = self._capacity(held + tokens)
        self._refresh(held)
        missing = tokens - packed[0].free_slots()
        if missing <= 0:
            return
        if index.plan.per_request:
            batch = packed[0].batch_size
            none = torch.zeros(batch, 0, dtype=torch.bool, device=packed[0].device)
            self._plan_chunk(none, none, None, held, packed[0].num_heads * packed[0].dense[0].shape[3])
            for layer in packed:
                layer.recompact()
            index.chunk, index.assignment, index.laid_out = None, None, []
            return
        grown = max(missing, self._spare(held))
        slots, origin = packed[0].codes[-4].shape[2], int(packed[0].cursor[2])
        if not index.plan.layers_place_tokens:
            index.positions[2] = extended(index.positions[2], slots + origin, grown)
            self._follow_positions()
        for layer in packed:
            layer.grow(grown)

    def _refresh(self, held: int) -> None:
        """Before a step, once: choose anew by importance, where the plan has tiers."""
        plan, index, packed = self.index.plan.tiers, self.index, self.packed_layers
        if plan is None or index.refreshed_at == held or not all(layer.tiers.settled for layer in packed):
            return
        index.refreshed_at, done = held, index.steps
        index.steps += 1
        for layer in packed:
            if done and done % plan.refresh_every == 0:
                layer.rank()
            if plan.revisits and index.steps % plan.refresh_every == 0:
                layer.tiers.attend_all()
        if plan.text is not None and done and done % plan.text.every == 0:
            recent = min(layer.prune_text(held - index.floor) for layer in packed)
            index.floor = max(index.floor, held - recent)

    @torch.compiler.disable
    @outside_inference_mode
    @without_autocast
    def settle(self, layer: CompactedLayer, attention: Tensor) -> None:
        """Give a layer the attention `[B, T]` that the newest prompt token pays to every position: it evicts and ranks by it."""
        index = self.index
        held = int(layer.cursor[0])
        index.floor = max(index.floor, held - layer.settle(attention, held - index.floor))
        index.steps, index.refreshed_at = 0, -1

    def unsettled(self) -> list[int]:
        """Layers with tiers whose attention was not seen since their last layout: they read every token they hold."""
        return [layer.layer_idx for layer in self.packed_layers if layer.tiers is not None and not layer.tiers.settled]

    def _extend_history(self, held: int) -> None:
        """Tokens appended since the last layout are text."""
        if self.history is not None and self.history[0].shape[1] < held:
            more = held - self.history[0].shape[1]
            self.history = tuple(torch.nn.functional.pad(flags, (0, more)) for flags in self.history)

    def _remember(self, appends: bool) -> None:
        """Keep what it takes to undo the coming chunk; `append` writes in place, a layout makes new tensors."""
        holders = [h for layer in self.layers for h in (layer, getattr(layer, "tiers", None)) if h is not None]
        saved = [(holder, snapshot(holder)) for holder in holders]
        index, history, planner = snapshot(self.index), self.history, self.planner
        written = [t for layer in self.packed_layers for t in (*layer.dense[2:], layer.cursor)] if appends else []
        before = [tensor.clone() for tensor in written]

        def undo() -> None:
            for holder, state in saved:
                holder.__dict__.update(state)
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(old)
            self.index.__dict__.update(index)
            self.history, self.planner = history, planner

        self._undo = undo

    def _roll_back(self) -> None:
        """Forget the chunk being stored; linear states can only be reset, where the cache was empty before."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        if self.packed_layers[0].is_initialized:
            self._half_taken = [i for i, layer in enumerate(self.layers) if has_linear_states(layer)]
        else:
            for layer in self.layers:
                if not isinstance(layer, CompactedLayer) or has_linear_states(layer):
                    layer.reset()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return for `query_length` new tokens of this layer."""
        eager, layer = not torch.compiler.is_dynamo_compiling(), self.layers[layer_idx]
        if eager and query_length <= MAX_APPEND and self._undo is None:
            self.reserve(query_length)
        if eager and isinstance(layer, CompactedLayer) and not self.is_compileable:
            # where a cache is not compileable, transformers makes no mask for one token that attends to all keys: none may be empty
            return int(layer.get_seq_length()) + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows with the generation."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the cache grows with the generation (the name before transformers 5.20)."""
        return -1

    def reset(self) -> None:
        """Forget every token; the plan and its model-scoped bases stay."""
        super().reset()
        plan, self.index.__dict__ = self.index.plan, SharedIndex().__dict__
        self.index.plan = plan
        self.history, self._undo, self._incoming, self._shown = None, None, (None, None), None
        self._half_taken = []

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens; raises ValueError past those that a prefill keeps croppable."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: tokens_to_remove is {tokens_to_remove}; pass a negative number of tokens to remove"
            )
        packed = self.packed_layers
        if packed and packed[0].is_initialized:
            held = int(packed[0].get_seq_length())
            if held + tokens_to_remove < self.index.floor:
                raise ValueError(
                    f"crop: cannot remove {-tokens_to_remove} of {held} tokens; only the newest {held - self.index.floor} "
                    "can go, the others are packed for good"
                )
        stuck = [i for i, layer in enumerate(self.layers) if cannot_crop(layer)]
        if stuck and tokens_to_remove:
            raise ValueError(
                f"crop: cannot remove {-tokens_to_remove} tokens; the linear states of layers {', '.join(map(str, stuck))} cannot "
                "go back"
            )
        for layer in self.layers:
            if not isinstance(layer, CompactedLayer) or layer.is_initialized:
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in the order `beam_idx` `[B]`, in place, so that compiled graphs keep their addresses."""
        self._map_rows(lambda tensor: tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows at `indices`."""
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    @outside_inference_mode
    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to every tensor that has a row per sequence."""
        for layer in self.layers:
            map_rows(layer, change)
        packed = [layer for layer in self.packed_layers if layer.is_initialized]
        if not packed:
            return
        for tensors in (
            self.index.positions,
            self.index.turns,
            *(tensors for layer in packed for tensors in layer.batched()),
        ):
            tensors[:] = [change(tensor) if tensor.dim() > 1 else tensor for tensor in tensors]
        if self.history is not None:
            self.history = tuple(change(flags) for flags in self.history)
        self.index.coordinates = self.index.coordinates.mapped(change)
        for layer in packed:
            layer.batch_size = layer.dense[0].shape[0]
            layer.mark_static()
        self._mark_positions()

    def report(self) -> dict[str, int | float]:
        """Bytes held: tokens, dense_bytes, sequence_bytes, model_bytes, ratio (accounting.cache_report)."""
        return cache_report(self)


def snapshot(holder: object) -> dict:
    """Attributes of an object, its lists and dictionaries copied."""
    return {name: copy(value) if isinstance(value, (list, dict)) else value for name, value in vars(holder).items()}
