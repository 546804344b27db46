"""The packed cache: a transformers `Cache` whose layers store compressed tokens."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from apack_compile.cache.accounting import cache_report
from apack_compile.cache.checks import Checks
from apack_compile.cache.chunk_places import Shape
from apack_compile.cache.drift import fit_notes
from apack_compile.cache.held_back import HeldBack
from apack_compile.cache.kept_layers import (
    check_cropped,
    has_linear_states,
    kept_layer,
    map_rows,
    why_not_cropped,
)
from apack_compile.cache.layer import MAX_APPEND, CompactedLayer
from apack_compile.cache.layer_groups import LayerGroups
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.cache.shared_index import Incoming, SharedIndex
from apack_compile.cache.token_index import there
from apack_compile.cache.undo import Undo, lengths_of, undo_of
from apack_compile.cache.watch import AskedRows, Watch, WatchedKeys
from apack_compile.errors import StrictError
from apack_compile.kernels.autocast import without_autocast
from apack_compile.models.inference_mode import outside_inference_mode
from apack_compile.plan.source import PlanSource


class CompactedCache(Cache):
    """Packed KV cache of one batch of sequences.

    kinds: one entry per layer of the model. own_layers: transformers' layers for those that are not packed. source: gives the
    plan of a prompt; asked once, at the first prefill. expected_tokens: new tokens to make room for from the start (the cache grows past
    it when it must). signature: what model it belongs to. strict: raise StrictError where tokens' rotary coordinates are needed and
    not shown. dtype: the model's, for states that come from torch.autocast. max_tokens: has room for all of them from the start.
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
        max_tokens: int | None = None,
    ) -> None:
        self.groups = LayerGroups(source, expected_tokens, max_tokens)
        layers = [
            self.groups.add(kind, own_layers.layers[kind.layer] if own_layers.layers else None)
            if kind.reason is None
            else kept_layer(own_layers.layers[kind.layer], kind.layer_type)
            for kind in kinds
        ]
        super().__init__(layers=layers)
        self.kinds, self.signature, self.strict, self.dtype = kinds, signature, strict, dtype
        self.notes: list[str] = []
        # A first prompt that nothing was calibrated for.
        self.held_back: HeldBack | None = None
        self.incoming: Incoming | None = None
        # Of the chunk being stored.
        self._asked: AskedRows | None = None
        self._undo: Undo | None = None
        self._drafted, self._checks = 0, Checks()
        # Why its tokens are not whole any more.
        self._broken: str | None = None
        # The module, by id, whose forward pass runs with this cache.
        self.running: int | None = None
        # Whether a pass over it may be compiled, where its layers can.
        self.may_compile = True
        # Chunks stored by eager forward passes, and how many of them when the one that runs began.
        self.eager_chunks = self.chunks_before = 0

    @property
    def index(self) -> SharedIndex:
        """What the layers share that see everything or, where there are none, the first ones that are packed."""
        return self.groups[0].index

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
        return self.groups.held - self.groups.floor

    @property
    def is_told(self) -> bool:
        """Whether a forward pass has said what comes, and not stored it yet."""
        return self.incoming is not None

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
        self.incoming = Incoming(vision, padding)

    def show_positions(self, positions: Tensor) -> None:
        """Tell what the model's rotary embedding is given for the coming chunk: `[C, B, n]` or `[B, n]`."""
        if self.incoming is not None:
            self.incoming = replace(self.incoming, shown=positions)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the states of one layer; raises ValueError (cache unchanged) for states that cannot be packed."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompactedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if torch.is_autocast_enabled(key_states.device.type):
            wider = reduce(torch.promote_types, (value_states.dtype, self.dtype or key_states.dtype), key_states.dtype)
            dtype = layer.dtype if layer.is_initialized else wider
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if torch.compiler.is_dynamo_compiling() and layer.is_initialized:
            return layer.update(key_states, value_states)
        return self._update_eagerly(layer, key_states, value_states)

    @torch.compiler.disable
    @outside_inference_mode
    @without_autocast
    def _update_eagerly(self, layer: CompactedLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Checked update of a layer, all or nothing over the layers of a chunk."""
        if self.held_back is not None:
            return self.held_back.take(layer, key, value)
        packed = self.packed_layers
        try:
            if layer is packed[0]:
                self._forget_unfinished()
                layer.check(key, value)
                self._begin(key, value)
            layer.check(key, value)
            self._checks.add(layer, key, value)
            out, watched = layer.update_watched(key, value)
            self._checks.watch(watched)
            if layer is packed[-1]:
                self._checks.read()
        except BaseException as error:
            try:
                if isinstance(error, Exception):
                    self._checks.blame()
            finally:
                self._roll_back()
            raise
        if layer.tiers is not None and layer.index.chunk is not None and layer.index.is_watched:
            out = WatchedKeys.of(out[0], Watch(self, layer, key.shape[2], self._asked.over(layer, out[0]))), out[1]
        if layer is packed[-1]:
            for text in fit_notes(packed):
                self.note(text)
            self._undo = self._asked = None
            self.groups.end_chunk()
        return out

    def pack_held_back(self) -> None:
        """Store the states that were held back, layer by layer; raises ValueError (cache unchanged) where they cannot be packed."""
        held, self.held_back = self.held_back, None
        for layer in self.packed_layers:
            self._update_eagerly(layer, *held.states.pop(layer.layer_idx))

    def _forget_unfinished(self) -> None:
        """Raise ValueError where the last chunk did not end: what this one's positions were counted from may be it."""
        if self._undo is not None:
            self.recover()
            self.check_whole()
            raise ValueError(
                "cache: the last forward pass did not end; the cache is as it was before it: call the model again"
            )
        self.check_whole()

    def _begin(self, key: Tensor, value: Tensor) -> None:
        """Decide, at the first packed layer, what happens to the coming chunk `[B, H_kv, n, D]`."""
        batch, heads, tokens, key_dim = key.shape
        self._checks, incoming = Checks(), self.incoming or Incoming()
        self.eager_chunks += 1
        if not self.is_told and tokens > 1 and self.signature:
            self._tell(
                f"{tokens} tokens came without a forward pass of the optimized model: all are stored as text, and none as padding; pass "
                "the cache to the model itself"
            )
        self.incoming = self._undo = None
        if self.is_filled and incoming.vision is None and tokens <= MAX_APPEND:
            held, has_pictures = self.groups.held, False
        else:
            (vision, padding), befores = self.groups.on_host((incoming.vision, incoming.padding), batch, tokens)
            held, has_pictures = befores[0].cursor[0], bool(vision.any())
        appends = held > 0 and tokens <= MAX_APPEND and not has_pictures
        self._drafted = self.groups.drafted(held, held + tokens)
        is_draft = held > 0 and self._drafted >= tokens and not has_pictures
        if appends:
            self.reserve(tokens)
        elif is_draft:
            with self._changing():
                self.groups.refresh(held)
        self._undo = undo_of(self, appends)
        for group in self.groups:
            group.index.length = None if self.is_compileable else held + tokens
            group.index.is_draft, group.index.chunk = is_draft, None
        if appends:
            self.groups.note_cursors(tokens)
            return
        # the first token of a draft is one that stays
        newest = 0 if is_draft else tokens - 1 - (self._drafted if self._drafted < tokens else 0)
        self._asked = AskedRows(newest, padding)
        self.groups.choose_plans(vision, padding)
        if not self.groups.follow_coordinates(incoming.shown, there(padding, key.device), held):
            self._tell(
                "a chunk's rotary coordinates were not seen (a prefill that is not eager?): its keys are rotated back as if it were all "
                "text, and coded worse"
            )
        if not all(plan.separates_vision for plan in self.groups.plans) and has_pictures:
            self.note("the calibration inputs held no vision tokens: vision tokens are stored with the text bases")
        self.groups.lay_out(
            (vision, padding), befores, Shape(batch, heads, key_dim, value.shape[3], key.dtype, key.device)
        )

    def _tell(self, text: str) -> None:
        """Note what was not seen; raises StrictError when strict."""
        if self.strict:
            raise StrictError(f"strict: {text}")
        self.note(text)

    @outside_inference_mode
    @without_autocast
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens: grow the storage, reuse it, or pack a full tail."""
        if self.is_filled:
            with self._changing():
                self.groups.reserve(tokens)

    @torch.compiler.disable
    @outside_inference_mode
    @without_autocast
    def settle(self, layer: CompactedLayer, importance: Tensor) -> None:
        """Give a layer the importance `[B, T]` of every position after a prompt: it evicts and ranks by it.

        Of a chunk that is all draft it comes from the attention of the first token, and nothing is evicted.
        """
        with self._changing():
            self.groups.settle(layer, importance, self._drafted)

    def unsettled(self) -> list[int]:
        """Layers with tiers whose attention was not seen since their last layout: they read every token they hold."""
        return self.groups.unsettled()

    def _roll_back(self) -> None:
        """Forget the chunk being stored; linear states can only be reset, where the cache was empty before."""
        if self._undo is not None:
            self._undo.apply()
            self._undo, self._broken, self._checks = None, None, Checks()
        if self.packed_layers[0].is_initialized:
            self._check_even(any(map(has_linear_states, self.layers)))
        else:
            for layer in self.layers:
                if not isinstance(layer, CompactedLayer) or has_linear_states(layer):
                    layer.reset()

    def _check_even(self, may_differ: bool) -> None:
        """Whether all layers hold as many tokens, and none may have taken some that it does not count: else the cache is broken."""
        if may_differ or len(lengths_of(self)) > 1:
            self._broken = "the last chunk did not end, and some layers keep what they took of it"

    def recover(self) -> None:
        """After a forward pass that did not end: forget what it stored; where that cannot be done, the next use of the cache says so."""
        self.running = None
        self.show_attention(False)
        self.incoming = self.held_back = None
        if self._undo is not None or not self.is_filled:
            self._roll_back()
        else:
            self._check_even(may_differ=False)

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

    # the name before transformers 5.20
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget every token; the plan and its model-scoped bases stay."""
        super().reset()
        self.groups.forget()
        self._undo = self.incoming = self._broken = self.running = self.held_back = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens; raises ValueError, the cache unchanged, for more than `croppable`."""
        tokens_to_remove = operator.index(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove is {tokens_to_remove}; pass a negative number of tokens")
        if self._undo is not None:
            self.recover()
        self.check_whole()
        self.groups.check_cropped(-tokens_to_remove)
        if tokens_to_remove:
            check_cropped(self.layers, -tokens_to_remove)
        for group in self.groups if self.is_filled else ():
            group.crop(tokens_to_remove)
        if self.is_recording:
            self.groups.recorded_from = self.groups.held
        for layer in self.layers:
            # transformers' windows raise where nothing is removed, too
            if not isinstance(layer, CompactedLayer) and (tokens_to_remove or why_not_cropped(layer) is None):
                layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """From now on any number of new text tokens can be cropped, and none of them is evicted, until a crop leaves them.

        Of what `generate` is given as a prompt the newest 32 can, as ever.
        """
        super().activate_past_recording()
        self.groups.recorded_from = self.groups.held

    def deactivate_past_recording(self) -> None:
        """The tokens that it holds, and those to come, are known to stay."""
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        self.groups.recorded_from = None

    @property
    def is_recording(self) -> bool:
        """Whether `activate_past_recording` was called."""
        return self.groups.recorded_from is not None

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
        if self.is_filled:
            self.groups.change_rows(change)

    def report(self) -> dict[str, int | float]:
        """Bytes held: tokens, dense_bytes, sequence_bytes, model_bytes, ratio (accounting.cache_report)."""
        return cache_report(self)
