"""How a layer stores a chunk of tokens, and packs its tail: states become slots of its segments."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apack_compile.cache.drift import WatchedPair
from apack_compile.cache.fitted import fitted_codings
from apack_compile.cache.packed_pair import Coding, PackedPair, Tokens, codings, empty_pair
from apack_compile.cache.token_index import Kept, Taken, count_of, kept_slots
from apack_compile.kernels.cursor import HELD
from apack_compile.kernels.state import KIND_NAMES, TEXT, VISION, DenseSegment
from apack_compile.plan.plan import STREAMS
from apack_compile.plan.rotation import deinterleaved_keys

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer

# Fewer tokens do not tell whether a basis fits.
MIN_WATCHED = 32
# At least so many of a stream's tokens, evenly spread, say what coding loses.
SAMPLE_TOKENS = 256

Pair = tuple[Tensor, Tensor]


@torch.compiler.disable
def store(layer: "CompactedLayer", key: Tensor, value: Tensor) -> tuple[Pair, list[WatchedPair]]:
    """Lay a chunk `[B, H_kv, n, D]` out in a layer's segments; K and V as `update` returns them, and what tells whether bases fit."""
    key, value = (x.detach() if x.requires_grad else x for x in (key, value))
    fresh, plan, chunk = not layer.is_initialized, layer.index.plan, layer.index.chunk
    given, key = key, deinterleaved_keys(key, plan.rotation)
    if fresh:
        layer.lazy_initialization(key, value)
    out, offset = ((given, value), 0) if fresh else _exact(layer, key, value)
    if fresh:
        parts = key, value
    elif plan.per_request:
        parts = out[0][:, :, : chunk.end], out[1][:, :, : chunk.end]
    else:
        parts = _tail_then(layer, key, value)
    if all(stream.scope == "half" for stream in plan.layers[layer.layer_idx].streams):
        parts = parts[0].to(layer.dense_dtype), parts[1].to(layer.dense_dtype)
    watched = _lay_out(layer, parts, fresh)
    return ((out[0][:, :, offset:], out[1][:, :, offset:]) if offset else out), watched


def recompact(layer: "CompactedLayer") -> None:
    """Pack a layer's tail: lay everything out anew with an empty chunk."""
    batch, heads, _, key_dim = layer.first.key.shape
    tiers = layer.tiers
    none = torch.empty(batch, heads, 0, key_dim, dtype=layer.dtype, device=layer.device)
    known = None if tiers is None else tiers.vision_importance(layer.index.chunk.held)
    was_settled = tiers is not None and tiers.settled
    store(layer, none, none.new_empty(batch, heads, 0, layer.first.value.shape[3]))
    if was_settled:
        tiers.observe(known)
        layer.rank()
        tiers.settled = True


def _exact(layer: "CompactedLayer", key: Tensor, value: Tensor) -> tuple[Pair, int]:
    """What is held, decoded, with the chunk exact at its end; the position from which on `update` returns it."""
    index, chunk = layer.index, layer.index.chunk
    cursor = layer.cursor.clone()
    cursor[HELD] += key.shape[2]
    length, offset = (index.length, 0) if index.length else layer.mask_sizes(chunk.held, key.shape[2])
    tokens = max(offset + length, chunk.end)
    positions = layer.positions() if index.plan.layers_place_tokens else chunk.positions
    state = layer.state_at(positions, layer.own_rotations or chunk.rotations, cursor, every=True)
    return torch.ops.apack.unpack.default(key, value, *state.flatten(), tokens), offset


def _tail_then(layer: "CompactedLayer", key: Tensor, value: Tensor) -> Pair:
    """The tail's tokens, in order, then the chunk's."""
    waiting = layer.index.chunk.waiting
    if waiting is None:
        return key, value
    tail = layer.tail
    return (
        torch.cat([tail.key.index_select(2, waiting).to(key.dtype), key], dim=2),
        torch.cat([tail.value.index_select(2, waiting).to(value.dtype), value], dim=2),
    )


def _lay_out(layer: "CompactedLayer", parts: Pair, fresh: bool) -> list[WatchedPair]:
    """Put the tokens of `parts` (K, V) where the chunk's plan says, behind the slots that each segment keeps."""
    index, tiers, plan = layer.index, layer.tiers, layer.index.plan
    chunk, earlier = index.chunk, layer.pairs
    used = _used(layer, fresh)
    where = chunk.segments
    if chunk.coarse is not None:
        where = _told_apart(layer, parts, used)
    if tiers is not None and plan.per_request and not fresh:
        where = tiers.without_evicted(where, chunk.end)
    layer.first = _dense(layer, chunk.first, parts, layer.first if not fresh and not plan.per_request else None)
    layer.tail = _dense(layer, chunk.tail, parts, None)
    fitted = plan.per_request
    tokens = {name: _taken(parts, taken) for name, taken in where.items() if taken.slots} if fitted else {}
    coded = fitted_codings(layer, tokens, where, earlier)
    layer.pairs, watched = {}, []
    for segment, taken in where.items():
        before = None if fitted else earlier.get(segment)
        states = parts if taken.slots == 0 else tokens.pop(segment, None) or _taken(parts, taken)
        made = _packed(layer, segment, before, states, taken, used[segment], coded.get(segment))
        layer.pairs[segment], lost = made
        watched += lost
    layer.cursor, layer.origin = chunk.cursor.clone(), chunk.text_origin
    text = count_of(used["text"]) + where["text"].slots
    if chunk.start - text != chunk.text_origin:
        layer.move_origin(chunk.start - text)
    if tiers is not None and plan.per_request:
        tiers.lay_out(index.positions, {VISION: where["vision"], TEXT: where["text"]}, chunk)
    elif tiers is not None:
        named = {VISION: "vision", TEXT: "text"}
        kept = {kind: used[name] for kind, name in named.items()}
        tiers.add_chunk(index.positions, kept, {kind: where[name] for kind, name in named.items()}, chunk)
    layer.follow_tensors()
    return watched


def _told_apart(layer: "CompactedLayer", parts: Pair, used: Mapping[str, Kept]) -> Mapping[str, Taken]:
    """Which of a chunk's tokens go where, as the layer tells coarse ones from fine ones; its positions and rotations follow."""
    chunk = layer.index.chunk
    placed = chunk.coarse.of_layer(layer.layer_idx, *parts)
    new = [chunk.first_positions.clone(), *placed.positions]
    if not layer.own_positions:
        layer.own_positions, layer.own_rotations = new, placed.rotations
        return placed.segments
    first, *packed = layer.own_positions
    old = [first, *(p[:, : count_of(used[name])] for name, p in zip(placed.segments, packed, strict=True))]
    layer.own_positions = [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
    layer.follow_positions()
    return placed.segments


def _used(layer: "CompactedLayer", fresh: bool) -> Mapping[str, Kept]:
    """The slots of each segment that stay."""
    chunk, plan = layer.index.chunk, layer.index.plan
    if fresh or plan.per_request:
        return dict.fromkeys(plan.segments, 0)
    every = {segment: pair.slots for segment, pair in layer.pairs.items()}
    return chunk.kept or every | {"text": chunk.packed - layer.origin}


def _dense(layer: "CompactedLayer", taken: Taken, parts: Pair, old: DenseSegment | None) -> DenseSegment:
    """Tokens as they are, behind those of `old`."""
    if taken.slots == 0:
        if old is not None:
            return old
        return DenseSegment(*(x.new_empty((*x.shape[:2], 0, x.shape[3]), dtype=layer.dense_dtype) for x in parts))
    new = []
    for states in parts:
        made = taken.copied(states)
        new.append(made if made.dtype == layer.dense_dtype else made.to(layer.dense_dtype))
    if old is None or old.slots == 0:
        return DenseSegment(*new)
    return DenseSegment(*(torch.cat(both, 2) for both in zip((old.key, old.value), new, strict=True)))


def _taken(parts: Pair, taken: Taken) -> Pair:
    """The tokens of K and V that go into a segment."""
    return taken.of(parts[0]), taken.of(parts[1])


def _packed(
    layer: "CompactedLayer",
    segment: str,
    before: PackedPair | None,
    states: Pair,
    taken: Taken,
    kept: Kept,
    coded: tuple[Coding, Coding] | None,
) -> tuple[PackedPair, list[WatchedPair]]:
    """A pair with the tokens of a chunk behind the slots that it keeps of `before`, and with free ones; what tells whether its bases fit.

    coded: how they are stored, where their bases are fitted to them.
    """
    plan, chunk, used = layer.index.plan, layer.index.chunk, count_of(kept)
    kind, planned = KIND_NAMES.index(segment), [layer.stream_plan(segment, name) for name in STREAMS]
    spare = chunk.spare if segment == "text" and not plan.per_request else 0
    if coded is not None:
        key, value = coded
    elif before is None:
        key, value = codings(plan, layer.layer_idx, segment, layer.dense_dtype, chunk.identity)
    else:
        key, value = map(Coding.of, before.streams)
    if taken.slots == 0:
        if before is None:
            before = empty_pair(kind, (key, value), plan, layer.layer_idx, *states)
        elif used != before.slots:
            before = before.with_tokens(lambda x: kept_slots(x, kept, 2).clone())
        return before.with_more_slots(spare) if spare else before, []
    expected = [how.expected_error if how.scope == "model" and how.bands.components else None for how in planned]
    is_watched = taken.tokens >= MIN_WATCHED and expected != [None, None]
    rotations = layer.rotations()[plan.segments.index(segment)] if layer.rotations() else None
    tokens = Tokens(
        *states,
        taken.real,
        rotations,
        block=0 if plan.rotation is None else plan.rotation.block,
        groups=plan.groups,
        used=used,
        slots=used + taken.slots + spare,
        every=max(taken.slots // SAMPLE_TOKENS, 1) if is_watched else 0,
    )
    pair, lost = tokens.packed(kind, key, value)
    if used:
        for new, stored in zip(pair.tensors, before.tensors, strict=True):
            if new.dim() > 1:
                new[:, :, :used] = kept_slots(stored, kept, 2)
    watched = WatchedPair(segment, lost, (expected[0], expected[1]), tokens if used == 0 else None)
    return pair, [watched] if is_watched else []
