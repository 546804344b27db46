"""The packed cache: a transformers `Cache` whose layers store compressed tokens."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from apack_compile.cache.accounting import cache_report
from apack_compile.cache.kept_layers import CROSS_ATTENTION, has_linear_states, kept_layer, map_rows, why_not_cropped
from apack_compile.cache.layer import MAX_APPEND, CompactedLayer
from apack_compile.cache.layer_group import Flags, LayerGroup
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.cache.packed_layers import packed_layer
from apack_compile.cache.shared_index import SharedIndex
from apack_compile.cache.watch import Watch, WatchedKeys
from apack_compile.checks import counted
from apack_compile.errors import StrictError
from apack_compile.kernels.autocast import without_autocast
from apack_compile.kernels.cursor import HELD
from apack_compile.models.coordinates import TokenCoordinates, coordinates_of
from apack_compile.models.inference_mode import outside_inference_mode
from apack_compile.plan.budget import spare_slots
from apack_compile.plan.plan import Plan
from apack_compile.plan.rotation import rotary_start
from apack_compile.plan.source import PlanSource

CAPACITY_GRAIN = 256


class CompactedCache(Cache):
    """Packed KV cache of one batch of sequences.

    kinds: one entry per layer of the model. own_layers: transformers' layers for those that are not packed. source: gives the
    plan of a prompt; asked once, at the first prefill.
    expected_tokens: new tokens to make room for from the start (the cache grows past it when it must). signature: what model it
    belongs to. strict: raise StrictError where tokens' rotary coordinates are needed and not shown. dtype: the model's, for states
    that come from torch.autocast.
    """

    def __init__(
        self,
        kinds: list[LayerKind],
        own_layers: DynamicCache,
        source: PlanSource,
        expected_tokens: int = 64,
        signature: tuple = (),
        strict: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.groups: list[LayerGroup] = []
        layers = [
            self._packed_layer(kind, own_layers.layers[kind.layer] if own_layers.layers else None)
            if kind.reason is None
            else kept_layer(own_layers.layers[kind.layer], kind.layer_type)
            for kind in kinds
        ]
        # what sees everything says how long the cache is
        self.groups.sort(key=lambda group: group.window is not None)
        super().__init__(layers=layers)
        self.kinds = kinds
        # None once it was asked.
        self.source: PlanSource | None = source
        self.expected_tokens = expected_tokens
        self.signature = signature
        self.strict = strict
        self.dtype = dtype
        self.notes: list[str] = []
        self._incoming: tuple[Tensor | None, Tensor | None] = (None, None)
        # Of the chunk being stored.
        self._padding: Tensor | None = None
        self._drafted, self._newest_row = 0, 0
        self.is_told = False
        # What the pass that runs gave its rotary embedding: `[C, B, n]` or `[B, n]`.
        self._shown: Tensor | None = None
        self._undo: Callable[[], None] | None = None
        # Why its tokens are not whole any more.
        self._broken: str | None = None
        # The module, by id, whose forward pass runs with this cache.
        self.running: int | None = None
        self.history: tuple[Tensor, Tensor] | None = None
        # Where generate's prompt ends: tokens from there on are generated or drafted, never pictures.
        self.prompt_end: int | None = None
        # While tokens may be cropped again in any number: where none of those before it will be.
        self._settled: int | None = None
        # Whether a pass over it may be compiled, where its layers can.
        self.may_compile = True
        # Chunks stored by eager forward passes, and how many of them when the one that runs began.
        self.eager_chunks = self.chunks_before = 0

    def _packed_layer(self, kind: LayerKind, own: Any) -> CompactedLayer:
        """The packed layer in the place of transformers' `own`, in the group with its window."""
        group = next((group for group in self.groups if group.window == kind.window), None)
        if group is None:
            group = LayerGroup(kind.window)
            self.groups.append(group)
        group.layers.append(packed_layer(kind.layer, group.index, own))
        return group.layers[-1]

    @property
    def index(self) -> SharedIndex:
        """What the layers share that see everything or, where there are none, the first ones that are packed."""
        return self.groups[0].index

    @property
    def plans(self) -> tuple[Plan | None, ...]:
        """The plan of each group of layers."""
        return tuple(group.index.plan for group in self.groups)

    @property
    def packed_layers(self) -> list[CompactedLayer]:
        """The layers that store compressed tokens."""
        return [layer for layer in self.layers if isinstance(layer, CompactedLayer)]

    @property
    def is_filled(self) -> bool:
        """Whether a prompt has been stored."""
        return all(layer.is_initialized for layer in self.packed_layers)

    @property
    def is_compileable(self) -> bool:
        """Whether a pass over this cache can be compiled; transformers gives one that cannot masks of two dimensions."""
        return self.may_compile and all(layer.is_compileable for layer in self.layers)

    @property
    def croppable(self) -> int:
        """How many of the newest tokens `crop` can remove."""
        return self.groups[0].held - self.floor if self.is_filled else 0

    @property
    def floor(self) -> int:
        """First position that can still be cropped."""
        return max(group.index.floor for group in self.groups)

    def note(self, text: str) -> None:
        """Something the report must say, once."""
        if text not in self.notes:
            self.notes.append(text)

    def show_attention(self, is_watched: bool) -> None:
        """Tell whether an eager pass begins, or has ended, whose attentions can be seen."""
        for group in self.groups:
            group.index.is_watched = is_watched

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
                self._forget_unfinished()
                self._check(layer, key, value)
                self._begin(key)
            self._check(layer, key, value)
            out = layer.update(key, value)
        except BaseException:
            self._roll_back()
            raise
        if layer.tiers is not None and layer.index.chunk is not None and layer.index.is_watched:
            out = WatchedKeys.of(out[0], Watch(self, layer, key.shape[2], self._newest_row, self._padding)), out[1]
        if layer is packed[-1]:
            self._note_fits(packed)
            self._undo = self._padding = None
            for group in self.groups:
                group.index.end_chunk()
        return out

    def _forget_unfinished(self) -> None:
        """Raise ValueError where the last chunk did not end: what this one's positions were counted from may be it."""
        if self._undo is not None:
            self.recover()
            self.check_whole()
            raise ValueError(
                "cache: the last forward pass did not end; the cache is as it was before it: call the model again"
            )
        self.check_whole()

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
        if layer.is_initialized:
            for name, got, want in (
                ("batch size", key.shape[0], layer.batch_size),
                ("number of KV heads", key.shape[1], layer.num_heads),
                ("head_dim", key.shape[3], layer.first.key.shape[3]),
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
        if not self.is_told and tokens > 1 and self.signature:
            self._note_unannounced(tokens)
        self._incoming, self._padding, self._shown, self.is_told = (None, None), padding, None, False
        self._undo = None
        held = self.groups[0].held
        has_pictures = vision is not None and bool(vision.any())
        appends = held > 0 and tokens <= MAX_APPEND and not has_pictures
        self._drafted = self._drafted_of(held, held + tokens)
        is_draft = held > 0 and self._drafted >= tokens and not has_pictures
        # the first token of a draft is one that stays
        self._newest_row = 0 if is_draft else tokens - 1 - (self._drafted if self._drafted < tokens else 0)
        if appends:
            self.reserve(tokens)
        elif is_draft:
            with self._changing():
                self._refresh(held)
        self._remember(appends)
        for group in self.groups:
            group.index.length = None if self.is_compileable else held + tokens
            group.index.is_draft = is_draft
            if appends:
                group.index.end_chunk()
        if appends:
            return
        none = torch.zeros(batch, tokens, dtype=torch.bool, device=key.device)
        vision, padding = (none if f is None or f.shape != none.shape else f.to(key.device) for f in (vision, padding))
        if self.source is not None:
            self.plan_for_prompt(vision, padding)
        self._plan_chunk((vision, padding), shown, held, key.shape[1] * key.shape[3])

    def _drafted_of(self, held: int, end: int) -> int:
        """How many of the newest of `end` tokens may be cropped again, whatever their number, once a chunk from `held` on is stored."""
        # while its past is recorded, what an empty cache is given is a prompt, unless generate says where that ends
        recorded = self._settled if held else None
        known = [position for position in (recorded, self.prompt_end) if position is not None]
        return max(end - max(known), 0) if known else 0

    def _settled_of(self, held: int, floor: int) -> int:
        """Of `held` tokens, the first that may be cropped again, with `floor` the first that can be."""
        if self._settled is None:
            return held
        return min(max(self._settled, self.prompt_end or 0, floor), held)

    def _note_unannounced(self, tokens: int) -> None:
        """Say that nothing told which of a chunk's tokens are vision or padding; raises StrictError when strict."""
        text = (
            f"{tokens} tokens came without a forward pass of the optimized model: all are stored as text, and none as padding; pass the "
            "cache to the model itself"
        )
        if self.strict:
            raise StrictError(f"strict: {text}")
        self.note(text)

    def plan_for_prompt(self, vision: Tensor, padding: Tensor) -> None:
        """Choose the plans of an empty cache now, for a prompt of which these tokens are vision and padding, bool `[B, T]` each."""
        for group in self.groups if self.source is not None else ():
            newest = slice(None if group.window is None else -group.window, None)
            real = ~padding[:, newest]
            share = float((vision[:, newest] & real).sum() / real.sum().clamp_min(1))
            group.index.plan = self.source.plan_for(real.shape[1], share, group.window)
        self.source = None

    def _plan_chunk(self, chunk: Flags, shown: Tensor | None, held: int, width: int) -> None:
        """Assign the chunk's tokens, of which these are vision and padding, to slots."""
        vision, padding = chunk
        tokens = vision.shape[1]
        end = held + tokens
        drafted = self._drafted_of(held, end)
        self._extend_coordinates(shown, padding, held)
        self._extend_history(chunk, held)
        if not all(plan.separates_vision for plan in self.plans) and bool(vision.any()):
            self.note("the calibration inputs held no vision tokens: vision tokens are stored with the text bases")
        for group in self.groups:
            group.lay_out(chunk, held, drafted, self._spare(end), width, self.history)
            # a chunk that `get_mask_sizes` took for an append keeps the capacity that it announced
            if tokens > MAX_APPEND or end > group.index.capacity:
                group.index.capacity = max(group.index.capacity, self._capacity(end))

    def _extend_coordinates(self, shown: Tensor | None, padding: Tensor, held: int) -> None:
        """Follow a chunk that begins at index `held` and whose rotary embedding was `shown` these positions; padding: bool `[B, n]`."""
        known: dict[tuple[int, bool], TokenCoordinates] = {}
        for group in self.groups:
            plan = group.index.plan
            which = (1 if plan.turn is None else plan.turn.coordinate_count, plan.has_coordinates)
            if which not in known:
                known[which] = self._followed(group.index.coordinates, which, shown, padding, held)
            group.index.coordinates = known[which]

    def _followed(
        self, before: TokenCoordinates | None, which: tuple[int, bool], shown: Tensor | None, padding: Tensor, held: int
    ) -> TokenCoordinates:
        """Coordinates of a group, so many and to be shown or not, after a chunk."""
        count, must_be_shown = which
        coordinates = before if held else TokenCoordinates.starting_at(rotary_start(padding), count)
        if not must_be_shown:
            return coordinates
        shown = coordinates_of(shown, len(padding), padding.shape[1], count)
        if shown is not None:
            return coordinates.followed_by(shown.to(padding.device), padding, held)
        text = (
            "a chunk's rotary coordinates were not seen (a prefill that is not eager?): its keys are turned back as if it "
            "were all text, and coded worse"
        )
        if self.strict:
            raise StrictError(f"strict: {text}")
        self.note(text)
        return coordinates

    def _spare(self, tokens: int) -> int:
        """Free text slots to keep when `tokens` tokens are held."""
        return max(16, min(self.expected_tokens, spare_slots(tokens)))

    def _capacity(self, tokens: int) -> int:
        """Logical length to offer when `tokens` tokens are held."""
        return -(-(tokens + max(self.expected_tokens, MAX_APPEND)) // CAPACITY_GRAIN) * CAPACITY_GRAIN

    @outside_inference_mode
    @without_autocast
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens: grow the storage, reuse it, or pack a full tail."""
        if self.is_filled:
            with self._changing():
                self._reserve(tokens)

    def _reserve(self, tokens: int) -> None:
        held = self.groups[0].held
        if held + tokens > self.index.capacity:
            for group in self.groups:
                group.index.capacity = self._capacity(held + tokens)
        self._refresh(held)
        if any(group.index.plan.per_request and group.missing(tokens) > 0 for group in self.groups):
            self._pack_tails(held)
        for group in self.groups:
            if not group.index.plan.per_request:
                group.reserve(tokens, self._spare(held), self._settled_of(held, group.index.floor))

    def _pack_tails(self, held: int) -> None:
        """Lay out what is held anew, where bases are fitted to it."""
        first = self.packed_layers[0]
        none = torch.zeros(first.batch_size, 0, dtype=torch.bool, device=first.device)
        self._plan_chunk((none, none), None, held, first.num_heads * first.first.key.shape[3])
        for layer in self.packed_layers:
            layer.recompact()
        for group in self.groups:
            group.index.end_chunk()

    def _refresh(self, held: int) -> None:
        """Before a step, once: choose anew by importance, where the plan has tiers."""
        for group in self.groups:
            plan, index, packed = group.index.plan.tiers, group.index, group.layers
            if plan is None or plan.reads_all or index.refreshed_at == held:
                continue
            if not all(layer.tiers.settled for layer in packed):
                continue
            index.refreshed_at, done = held, index.steps
            index.steps += 1
            for layer in packed:
                if done and done % plan.refresh_every == 0:
                    layer.rank()
                if plan.revisits and index.steps % plan.refresh_every == 0:
                    layer.tiers.attend_all()
            if plan.prune_every is not None and done and done % plan.prune_every == 0:
                settled = self._settled_of(held, index.floor)
                index.floor = max(index.floor, *(layer.evict([("text",)], settled) for layer in packed))

    @torch.compiler.disable
    @outside_inference_mode
    @without_autocast
    def settle(self, layer: CompactedLayer, importance: Tensor) -> None:
        """Give a layer the importance `[B, T]` of every position after a prompt: it evicts and ranks by it.

        Of a chunk that is all draft it comes from the attention of the first token, and nothing is evicted.
        """
        index, held = layer.index, int(layer.cursor[HELD])
        with self._changing():
            if index.is_draft and layer.tiers.earlier:
                layer.observe_draft(importance)
                return
            index.floor = max(index.floor, layer.settle(importance, max(held - self._drafted, index.floor)))
            index.steps, index.refreshed_at = 0, -1

    def unsettled(self) -> list[int]:
        """Layers with tiers whose attention was not seen since their last layout: they read every token they hold."""
        return [layer.layer_idx for layer in self.packed_layers if layer.tiers is not None and not layer.tiers.settled]

    def _extend_history(self, chunk: Flags, held: int) -> None:
        """Where bases are fitted to every token: which are vision and which padding. Those appended since the last layout are text."""
        if not any(plan.per_request for plan in self.plans):
            return
        past: Flags = self.history or (chunk[0][:, :0], chunk[1][:, :0])
        more = max(held - past[0].shape[1], 0)
        padded = [torch.nn.functional.pad(flags[:, :held], (0, more)) for flags in past]
        self.history = (torch.cat([padded[0], chunk[0]], 1), torch.cat([padded[1], chunk[1]], 1))

    def _remember(self, appends: bool) -> None:
        """Keep what it takes to undo the coming chunk; `append` writes in place, a layout makes new tensors."""
        holders = [h for layer in self.layers for h in (layer, getattr(layer, "tiers", None)) if h is not None]
        saved = [(holder, snapshot(holder)) for holder in holders]
        indices = [(group.index, snapshot(group.index)) for group in self.groups]
        history, source = self.history, self.source
        written = (
            [t for layer in self.packed_layers for t in (layer.tail.key, layer.tail.value, layer.cursor)]
            if appends
            else []
        )
        before = [tensor.clone() for tensor in written]

        def undo() -> None:
            for holder, state in (*saved, *indices):
                holder.__dict__.update(state)
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(old)
            self.history, self.source = history, source

        self._undo = undo

    def _roll_back(self) -> None:
        """Forget the chunk being stored; linear states can only be reset, where the cache was empty before."""
        if self._undo is not None:
            self._undo()
            self._undo = self._broken = None
        if self.packed_layers[0].is_initialized:
            self._find_uneven_layers([i for i, layer in enumerate(self.layers) if has_linear_states(layer)])
        else:
            for layer in self.layers:
                if not isinstance(layer, CompactedLayer) or has_linear_states(layer):
                    layer.reset()

    def _find_uneven_layers(self, unknown: list[int]) -> None:
        """The cache is broken where layers hold different numbers of tokens, or linear states (`unknown`) may have taken some."""
        growing = [
            layer
            for layer, kind in zip(self.layers, self.kinds, strict=True)
            if isinstance(layer, (CompactedLayer, DynamicLayer)) and kind.layer_type != CROSS_ATTENTION
        ]
        held = [int(layer.get_seq_length()) if layer.is_initialized else 0 for layer in growing]
        if unknown or len(set(held)) > 1:
            self._broken = "the last chunk did not end, and some layers keep what they took of it"

    def recover(self) -> None:
        """After a forward pass that did not end: forget what it stored; where that cannot be done, the next use of the cache says so."""
        self.running = None
        self.show_attention(False)
        self._incoming, self._shown, self.is_told = (None, None), None, False
        if self._undo is not None or not self.is_filled:
            self._roll_back()
        else:
            self._find_uneven_layers([])

    def check_whole(self) -> None:
        """Raise ValueError where tokens were lost in a forward pass that did not end."""
        if self._broken is not None:
            raise ValueError(f"cache: {self._broken}: reset the cache, or use a new one")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around a change in place, which cannot be undone when it does not end."""
        try:
            yield
        except BaseException:
            self._broken = "an error or an interrupt came while its tokens were moved"
            raise

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
        for group in self.groups:
            group.index.forget()
        self._settled = None if self._settled is None else 0
        self.history, self._undo, self._incoming, self._shown = None, None, (None, None), None
        self._broken = self.running = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens; raises ValueError, the cache unchanged, for more than `croppable`."""
        tokens_to_remove = operator.index(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: tokens_to_remove is {tokens_to_remove}; pass a negative number of tokens to remove"
            )
        if self._undo is not None:
            self.recover()
        self.check_whole()
        if -tokens_to_remove > self.croppable:
            held = self.groups[0].held
            why = "" if held == self.croppable else ", the others are packed for good"
            if why and self._settled is None:
                why += "; call activate_past_recording() on the cache before the tokens that may have to go"
            raise ValueError(
                f"crop: cannot remove {-tokens_to_remove} of {held} tokens; only the newest {self.croppable} can go{why}"
            )
        if tokens_to_remove:
            self._check_kept_layers(-tokens_to_remove)
        for group in self.groups if self.is_filled else ():
            group.crop(tokens_to_remove)
        self._settled = None if self._settled is None else self.groups[0].held
        for layer in self.layers:
            # transformers' windows raise where nothing is removed, too
            if not isinstance(layer, CompactedLayer) and (tokens_to_remove or why_not_cropped(layer) is None):
                layer.crop(tokens_to_remove)

    def _check_kept_layers(self, tokens: int) -> None:
        """Raise ValueError where a layer that is not packed cannot give up its newest tokens."""
        stuck: dict[str, list[int]] = {}
        for i, layer in enumerate(self.layers):
            if (why := why_not_cropped(layer)) is not None:
                stuck.setdefault(why, []).append(i)
        for why, layers in stuck.items():
            raise ValueError(
                f"crop: cannot remove {counted(tokens, 'token')}; the {why} of layers {', '.join(map(str, layers))} cannot go back"
            )

    def activate_past_recording(self) -> None:
        """From now on any number of new text tokens can be cropped, and none of them is evicted, until a crop leaves them.

        Of what `generate` is given as a prompt the newest 32 can, as ever.
        """
        super().activate_past_recording()
        self._settled = self.groups[0].held

    def deactivate_past_recording(self) -> None:
        """The tokens that it holds, and those to come, are known to stay."""
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        self._settled = None

    @property
    def is_recording(self) -> bool:
        """Whether `activate_past_recording` was called."""
        return self._settled is not None

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
        for group in self.groups:
            for tensors in (group.index.positions, group.index.turns):
                tensors[:] = map(change, tensors)
        if self.history is not None:
            self.history = tuple(change(flags) for flags in self.history)
        for layer in packed:
            layer.change_rows(change)
            layer.mark_static()
        changed: dict[int, TokenCoordinates] = {}
        for group in self.groups:
            shared = id(group.index.coordinates)
            # once: a change may be in place
            if shared not in changed:
                changed[shared] = group.index.coordinates.mapped(change)
            group.index.coordinates = changed[shared]
            group.mark_positions()

    def report(self) -> dict[str, int | float]:
        """Bytes held: tokens, dense_bytes, sequence_bytes, model_bytes, ratio (accounting.cache_report)."""
        return cache_report(self)


def snapshot(holder: object) -> dict:
    """Attributes of an object, its lists and dictionaries copied."""
    return {name: copy(value) if isinstance(value, (list, dict)) else value for name, value in vars(holder).items()}
