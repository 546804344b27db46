"""How a layer stores a chunk of tokens, and packs its tail: states become slots of its segments."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apack_compile.cache.drift import Fit, lost_share, refit
from apack_compile.cache.packed_pair import PackedPair
from apack_compile.cache.token_index import Kept, count_of, flags_at, gather_tokens, kept_slots, positions_of
from apack_compile.kernels.cursor import HELD
from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import StreamBasis
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.rotations import rotated, rotations_of_slots
from apack_compile.kernels.state import TEXT, VISION, DenseSegment, PackedStream
from apack_compile.models.modality import compact
from apack_compile.plan.basis import fit, fit_steps, moments
from apack_compile.plan.coarse_rule import NEWEST, least_important, scores_of
from apack_compile.plan.plan import FITTED_SCOPES, STREAMS, StreamPlan
from apack_compile.plan.rotation import deinterleaved_keys

if TYPE_CHECKING:
    from apack_compile.cache.layer import CompactedLayer

# Fewer tokens do not tell whether a basis fits.
MIN_WATCHED = 32

Pair = tuple[Tensor, Tensor]


@torch.compiler.disable
def store(layer: "CompactedLayer", key: Tensor, value: Tensor) -> Pair:
    """Lay a chunk `[B, H_kv, n, D]` out in a layer's segments; K and V as `update` returns them."""
    key, value = key.detach(), value.detach()
    fresh, plan = not layer.is_initialized, layer.index.plan
    if fresh:
        layer.lazy_initialization(key, value)
    held, packed, origin = layer.cursor.tolist()
    end = held + key.shape[2]
    given, key = key, deinterleaved_keys(key, plan.rotation)
    out, offset = ((given, value), 0) if fresh else _exact(layer, key, value)
    earlier: Mapping[str, PackedPair] = {}
    used: Mapping[str, Kept]
    if plan.per_request:
        earlier = {} if fresh else layer.pairs
        layer.lazy_initialization(key, value)
        parts, used = (out[0][:, :, :end], out[1][:, :, :end]), dict.fromkeys(plan.segments, 0)
    else:
        parts = _tail_then(layer, key, value)
        every = {segment: pair.slots for segment, pair in layer.pairs.items()}
        used = layer.index.chunk.kept or every | {"text": packed - origin}
    _lay_out(layer, parts, used, end, earlier)
    return (out[0][:, :, offset:], out[1][:, :, offset:]) if offset else out


def recompact(layer: "CompactedLayer") -> None:
    """Pack a layer's tail: lay everything out anew with an empty chunk."""
    batch, heads, _, key_dim = layer.first.key.shape
    tiers = layer.tiers
    none = torch.empty(batch, heads, 0, key_dim, dtype=layer.dtype, device=layer.device)
    known = None if tiers is None else tiers.vision_importance(int(layer.cursor[HELD]))
    was_settled = tiers is not None and tiers.settled
    store(layer, none, none.new_empty(batch, heads, 0, layer.first.value.shape[3]))
    if was_settled:
        tiers.observe(known)
        layer.rank()
        tiers.settled = True


def _exact(layer: "CompactedLayer", key: Tensor, value: Tensor) -> tuple[Pair, int]:
    """What is held, decoded, with the chunk exact at its end; the position from which on `update` returns it."""
    index = layer.index
    cursor = layer.cursor + torch.tensor([key.shape[2], 0, 0], device=key.device)
    length, offset = (index.length, 0) if index.length else layer.get_mask_sizes(key.shape[2])
    tokens = max(offset + length, int(cursor[HELD]))
    positions = layer.positions() if index.plan.layers_place_tokens else index.chunk.positions
    state = layer.state_at(positions, layer.own_rotations or index.chunk.rotations, cursor, every=True)
    return torch.ops.apack.unpack.default(key, value, *state.flatten(), tokens), offset


def _tail_then(layer: "CompactedLayer", key: Tensor, value: Tensor) -> Pair:
    """The tail's tokens, in order, then the chunk's."""
    held, packed, _ = layer.cursor.tolist()
    ring = torch.arange(packed, held, device=key.device) % max(layer.tail.slots, 1)
    return (
        torch.cat([layer.tail.key[:, :, ring].to(key.dtype), key], dim=2),
        torch.cat([layer.tail.value[:, :, ring].to(value.dtype), value], dim=2),
    )


def _lay_out(
    layer: "CompactedLayer", parts: Pair, used: Mapping[str, Kept], end: int, earlier: Mapping[str, PackedPair]
) -> None:
    """Put the tokens of `parts` (K, V) where the chunk's plan says, behind the `used` slots of each segment.

    earlier: the segments before, where bases are fitted to all tokens anew.
    """
    index, tiers, plan = layer.index, layer.tiers, layer.index.plan
    assignment = index.chunk.assignment
    where = {"vision": assignment.vision, "text": assignment.text}
    if plan.coarse is not None:
        where = _told_apart(layer, parts)
        _place(layer, where, used)
    if tiers is not None and plan.per_request:
        alive = tiers.alive(end)
        where = {name: torch.where(alive.gather(1, i.clamp_min(0)), i, -1) for name, i in where.items()}
    first = (gather_tokens(states, assignment.first).to(layer.first.key.dtype) for states in parts)
    layer.first = DenseSegment(*map(torch.cat, zip((layer.first.key, layer.first.value), first, strict=True), (2, 2)))
    for segment, tokens in where.items():
        for name, states in zip(STREAMS, parts, strict=True):
            before = getattr(earlier[segment], name).basis if earlier else None
            stream = _with_chunk(layer, segment, name, states, tokens, used[segment], before)
            layer.pairs[segment] = layer.pairs[segment].with_stream(name, stream)
    start = end - assignment.tail
    ring = torch.arange(start, end, device=layer.device) % max(layer.tail.slots, 1)
    key, value = (x[:, :, x.shape[2] - assignment.tail :].to(layer.tail.key.dtype) for x in parts)
    layer.tail = DenseSegment(layer.tail.key.index_copy(2, ring, key), layer.tail.value.index_copy(2, ring, value))
    layer.cursor = torch.tensor([end, start, start - layer.text_slots], device=layer.device)
    if tiers is not None and plan.per_request:
        tiers.lay_out(index.positions, {VISION: where["vision"], TEXT: where["text"]}, end)
    elif tiers is not None:
        slots = {VISION: used["vision"], TEXT: used["text"]}
        tiers.add_chunk(index.positions, slots, end - parts[0].shape[2], end)
    layer.grow(index.chunk.spare)


def _with_chunk(
    layer: "CompactedLayer",
    segment: str,
    name: str,
    states: Tensor,
    where: Tensor,
    used: Kept,
    before: StreamBasis | None,
) -> PackedStream:
    """A stream with chunk states `[B, H_kv, n, D]` at `where` `[B, N]` behind its `used` slots.

    A basis of a sequence or batch is fitted on the way; before: the one that it had.
    """
    plan, stream = layer.index.plan, getattr(layer.pairs[segment], name)
    planned = layer.stream_plan(segment, name)
    tokens, real = gather_tokens(states, where), where >= 0
    if name == "key" and layer.rotations():
        first_slot = count_of(used)
        slots = torch.arange(first_slot, first_slot + tokens.shape[2], device=tokens.device)
        blocks = dict(zip(layer.pairs, layer.rotations(), strict=True))[segment]
        rotations = rotations_of_slots(blocks, plan.rotation.block, slots)[:, None]
        tokens = rotated(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), rotations, back=True)
    x = to_groups(tokens, plan.groups)
    if planned.scope in FITTED_SCOPES:
        stream = _fitted(stream, planned, x, real, before)
    if planned.scope == "model":
        stream = _watched(layer, stream, planned, f"{segment}_{name}", x, real)
    codes, scale = encode(x, stream.basis, stream.bands, planned.token_scale)
    codes = codes.to(stream.codes.dtype) if planned.scope == "half" else codes
    if scale.dim() <= 1:
        scale = stream.scale
    elif not plan.per_request:
        scale = torch.cat([kept_slots(stream.scale, used, 2), scale], dim=2)
    if not plan.per_request:
        codes = torch.cat([kept_slots(stream.codes, used, 2), codes], dim=2)
    return replace(stream, codes=codes, scale=scale)


def _fitted(
    stream: PackedStream, plan: StreamPlan, x: Tensor, real: Tensor, before: StreamBasis | None
) -> PackedStream:
    """A stream with a basis of the tokens `[B, G, N, W_g]` that are `real` `[B, N]`, each row's or that of all rows."""
    if plan.scope == "batch":
        x, real = x.transpose(0, 1).flatten(1, 2)[None], real.reshape(1, -1)
    bands = plan.bands.at_most(x.shape[2])
    rows = before.decoder if before is not None and bool(before.decoder.any()) else None
    spectrum = fit(moments(x, real.to(torch.float32)), bands.components, rows)
    if not all(band.is_float for count, band in bands.parts if count):
        # a Gaussian's steps clip a sequence's outliers, which costs more than all else
        spectrum = fit_steps(spectrum, x, token_scale=False)
    return replace(stream, basis=spectrum.basis(bands, torch.float16), bands=bands)


def _watched(
    layer: "CompactedLayer", stream: PackedStream, plan: StreamPlan, name: str, x: Tensor, real: Tensor
) -> PackedStream:
    """Measure how well a shared basis codes tokens `[B, G, N, W_g]`; with another one where it is bad and nothing is stored with it."""
    if plan.bands.components == 0 or int(real.sum()) < MIN_WATCHED:
        return stream
    fitted = Fit(lost_share(x, real, stream.basis, plan.bands, plan.token_scale), plan.expected_error)
    if fitted.is_bad and stream.codes.shape[2] == 0:
        again = refit(x, real, plan.bands, stream.basis)
        after = Fit(lost_share(x, real, again, plan.bands, plan.token_scale), plan.expected_error)
        if after.found < fitted.found:
            stream = replace(stream, basis=again)
            layer.refitted[name] = fitted
            fitted = after
    layer.fits[name] = fitted
    return stream


def _told_apart(layer: "CompactedLayer", parts: Pair) -> dict[str, Tensor]:
    """Where a chunk's tokens go, chunk indices `[B, slots]` per packed segment; the newest text is fine."""
    index, rule = layer.index, layer.index.plan.coarse
    chunk, assignment = index.chunk.chunk, index.chunk.assignment
    tokens, recent = parts[0].shape[2], assignment.recent - assignment.tail
    older, newest = assignment.text.split([assignment.text.shape[1] - recent, recent], dim=1)
    column = torch.arange(tokens, device=older.device)
    candidates = flags_at(assignment.vision if rule.modality == "vision" else older, tokens) & (
        column < tokens - NEWEST
    )
    coordinates = index.coordinates.at((chunk.start + column).expand(len(older), -1))
    scores = scores_of(parts[0], parts[1], coordinates, index.plan.rotation, rule.weights[layer.layer_idx])
    coarse = least_important(candidates, scores, rule.share)
    fine = {"vision": assignment.vision, "text": assignment.text}
    if rule.modality == "vision":
        fine["vision"] = compact(flags_at(assignment.vision, tokens) & ~coarse)
    else:
        fine["text"] = torch.cat([compact(flags_at(older, tokens) & ~coarse), newest], 1)
    return {"coarse": compact(coarse), **fine}


def _place(layer: "CompactedLayer", where: Mapping[str, Tensor], used: Mapping[str, int]) -> None:
    """Positions and rotations of a chunk's tokens, behind those of the `used` slots."""
    chunk = layer.index.chunk
    new = [positions_of(i, chunk.chunk.start) for i in (chunk.assignment.first, *where.values())]
    if layer.own_positions:
        first, *packed = layer.own_positions
        old = [first, *(p[:, : used[name]] for name, p in zip(where, packed, strict=True))]
        new = [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
    layer.own_positions = new
    layer.follow_positions()
