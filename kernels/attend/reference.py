"""Specification of `apack::attend` in plain torch: the absorbed form.

With K = mean + C diag(step) D, a score is `q . mean + ((q D.T) * step) . C`, and with attention weights P the output is
`(sum P) mean + ((P C) * step) D`: each coefficient is read once for all query heads, nothing is decompressed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from apack_compile.kernels.cursor import HELD, stored_before, tail_positions
from apack_compile.kernels.format import centered_levels
from apack_compile.kernels.heads import to_heads
from apack_compile.kernels.rotations import rotated
from apack_compile.kernels.state import TEXT, VISION, PackedState, PackedStream, Segment, check_tiers


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    state: list[Tensor] | None = None,
    layout: Sequence[int] = (),
    scale: float | None = None,
    vision_importance: Tensor | None = None,
    text_importance: Tensor | None = None,
    tiers: Tensor | None = None,
    partial: int = 0,
    ema: Sequence[float] | None = None,
) -> Tensor:
    """Attention `[B, H_q, rows, D_v]` of `query` `[B, H_q, rows, D]` over stored and new tokens; a row that may attend nothing is 0.

    tiers: int32 `[B, 2]`, how many leading vision slots are read with all value components (the others with the leading
    `partial`), and how many are read at all. importance: float32 `[B, slots]`, updated with the mean over heads
    of the newest query's attention a: `keep * importance + add * a` at the slots that were read; ema: vision's keep and add, text's.
    Raises ValueError for lists that are no state (kernels/state.py).
    """
    held = PackedState.parse(state, layout)
    if tiers is not None:
        slots = [segment.slots for segment in held.segments]
        check_tiers(held.layout.kinds, slots, len(key), vision_importance, text_importance)
    cursor = held.cursor
    batch, heads, new_tokens, head_dim = key.shape
    rows = query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    # [B, H_kv, (heads per KV head) * rows, D]: the query heads of a KV head are rows of it
    q = query.to(dtype).reshape(batch, heads, -1, head_dim) * (head_dim**-0.5 if scale is None else scale)

    scores = [q @ held.first.key.to(dtype).mT]
    scores += [_segment_scores(q, segment, held.block) for segment in held.segments]
    scores += [q @ held.tail.key.to(dtype).mT, q @ key.to(dtype).mT]

    stored = [p.expand(batch, -1) for p in (held.first_positions, *(s.positions for s in held.segments))]
    where = [(p, stored_before(p, cursor, new_tokens)) for p in stored]
    if tiers is not None:
        seen, occupied = where[1]
        where[1] = (seen, occupied & _leading(seen, tiers[:, 1]))
    ring = tail_positions(held.tail.slots, cursor).expand(batch, -1)
    where.append((ring, ring < cursor[HELD] - new_tokens))
    newest = (cursor[HELD] - new_tokens + torch.arange(new_tokens, device=key.device)).expand(batch, -1)
    where.append((newest, torch.ones_like(newest, dtype=torch.bool)))
    position = torch.cat([p.long() for p, _ in where], dim=1)
    occupied = torch.cat([o for _, o in where], dim=1)

    score = torch.cat(scores, dim=-1).reshape(batch, query.shape[1], rows, -1)
    score = _masked(score, mask, position, occupied, new_tokens, cursor)
    weights = _softmax(score).reshape(batch, heads, -1, score.shape[-1])
    parts = weights.split([s.shape[-1] for s in scores], dim=-1)
    rules = {VISION: (vision_importance, (ema or ())[:2]), TEXT: (text_importance, (ema or ())[2:])}
    for segment, part, (_, is_read) in zip(held.segments, parts[1:-2], where[1:-2], strict=True):
        known, weights_of = rules.get(segment.kind, (None, ()))
        if known is None or known.numel() == 0:
            continue
        # Heads may come as rows (grouped query), so the newest token is every `new_tokens`-th row.
        newest_row = part.unflatten(2, (-1, new_tokens))[:, :, :, -1].flatten(1, 2).mean(1)
        keep, add = weights_of
        known.copy_(torch.where(is_read, keep * known + add * newest_row.to(known.dtype), known))

    out = parts[0] @ _occupied_only(held.first.value.to(dtype), where[0][1])
    for segment, part in zip(held.segments, parts[1:-2], strict=True):
        level = _levels(segment.value, dtype)
        if tiers is not None and segment.kind == VISION and level is not None and partial < level.shape[-1]:
            full = _leading(segment.positions, tiers[:, 0])[:, None, :, None]
            level[..., partial:] = level[..., partial:].masked_fill(~full, 0.0)
        out = out + _packed_output(part, segment.value, level)
    out = out + parts[-2] @ _occupied_only(held.tail.value.to(dtype), where[-2][1]) + parts[-1] @ value.to(dtype)
    return out.reshape(batch, query.shape[1], rows, value.shape[-1]).to(query.dtype)


def _leading(positions: Tensor, count: Tensor) -> Tensor:
    """Which slots `[B, N]` are among the first `count` `[B]`."""
    return torch.arange(positions.shape[1], device=positions.device) < count[:, None]


def _occupied_only(values: Tensor, occupied: Tensor) -> Tensor:
    """Dense values `[B, H, N, D]` with zeros in empty slots, where a weight of 0 would not stop a NaN."""
    return values.masked_fill(~occupied[:, None, :, None], 0.0)


def _levels(stream: PackedStream, dtype: torch.dtype) -> Tensor | None:
    """Coefficients in units of their step; None for a stream kept as it is."""
    return None if stream.as_is else centered_levels(stream.codes, stream.bands, dtype)


def _segment_scores(q: Tensor, segment: Segment, block: int) -> Tensor:
    """Scores `[B, H, Q, N]` of queries `[B, H, Q, D]` against a packed segment."""
    levels = _levels(segment.key, q.dtype)
    if segment.rotations is None:
        return _packed_scores(q, segment.key, levels)
    return _relative_scores(q, segment.key, levels, segment.rotations, block)


def _packed_scores(q: Tensor, stream: PackedStream, levels: Tensor | None) -> Tensor:
    """Scores `[B, H, Q, N]` of queries `[B, H, Q, D]` against a packed key stream."""
    heads, head_dim = q.shape[1], q.shape[3]
    if levels is None:
        return q @ _kept_heads(stream, heads, q.dtype).mT
    per_group = heads // stream.groups
    decoder = stream.basis.decoder.to(q.dtype).unflatten(-1, (per_group, head_dim)).transpose(2, 3)
    mean = stream.basis.mean.to(q.dtype).unflatten(-1, (per_group, head_dim))
    grouped = q.unflatten(1, (stream.groups, per_group))
    latent = (grouped @ decoder.mT) * stream.basis.step.to(q.dtype)[:, :, None, None]
    scores = latent.flatten(2, 3) @ levels.mT
    if stream.scale.numel():
        scores = scores * stream.scale.to(q.dtype)[:, :, None]
    offset = (grouped @ mean[..., None]).flatten(2, 3)
    return (scores + offset).unflatten(2, (per_group, -1)).flatten(1, 2)


def _relative_scores(q: Tensor, stream: PackedStream, levels: Tensor | None, rotations: Tensor, block: int) -> Tensor:
    """Scores `[B, H, Q, N]` against keys that were rotated back block by block: a query is rotated back alike."""
    slots = stream.codes.shape[2]
    scores = []
    for i, start in enumerate(range(0, slots, block)):
        part = slice(start, min(start + block, slots))
        within = replace(stream, codes=stream.codes[:, :, part], scale=stream.scale[..., part])
        back = rotated(q, rotations[:, i, None, None], back=True)
        scores.append(_packed_scores(back, within, None if levels is None else levels[:, :, part]))
    return torch.cat(scores, dim=-1) if scores else q.new_empty((*q.shape[:3], 0))


def _packed_output(weights: Tensor, stream: PackedStream, levels: Tensor | None) -> Tensor:
    """Output `[B, H, Q, D]` of attention weights `[B, H, Q, N]` over a packed value stream."""
    heads = weights.shape[1]
    if levels is None:
        return weights @ _kept_heads(stream, heads, weights.dtype)
    per_group = heads // stream.groups
    grouped = weights.unflatten(1, (stream.groups, per_group))
    scaled = grouped * stream.scale.to(weights.dtype)[:, :, None, None] if stream.scale.numel() else grouped
    latent = (scaled.flatten(2, 3) @ levels).unflatten(2, (per_group, -1))
    latent = latent * stream.basis.step.to(weights.dtype)[:, :, None, None]
    decoder = stream.basis.decoder.to(weights.dtype).unflatten(-1, (per_group, -1)).transpose(2, 3)
    mean = stream.basis.mean.to(weights.dtype).unflatten(-1, (per_group, -1))
    out = latent @ decoder + grouped.sum(-1, keepdim=True) * mean[:, :, :, None]
    return out.flatten(1, 2)


def _kept_heads(stream: PackedStream, heads: int, dtype: torch.dtype) -> Tensor:
    """A stream kept as it is, as heads `[B, H, N, D]`."""
    return to_heads(stream.codes, heads).to(dtype)


def _masked(
    score: Tensor,
    mask: Tensor | None,
    position: Tensor,
    occupied: Tensor,
    new_tokens: int,
    cursor: Tensor,
) -> Tensor:
    """Scores `[B, H, rows, S]` with the mask by position, and -inf at empty slots."""
    batch, rows = score.shape[0], score.shape[2]
    if mask is None:
        if rows == new_tokens:
            ends = cursor[HELD] - new_tokens + torch.arange(rows, device=score.device)
            occupied = occupied[:, None, None] & (position[:, None, None] <= ends[:, None])
        else:
            occupied = occupied[:, None, None]
    else:
        column = position.clamp(0, mask.shape[-1] - 1)[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        by_slot = mask.expand(batch, -1, -1, -1).gather(-1, column)
        occupied = occupied[:, None, None]
        if by_slot.dtype == torch.bool:
            occupied = occupied & by_slot
        else:
            score = score + by_slot.to(score.dtype)
    return score.masked_fill(~occupied, float("-inf"))


def _softmax(score: Tensor) -> Tensor:
    """Softmax over the last dimension; all zeros where every score is -inf."""
    top = score.amax(-1, keepdim=True)
    weights = (score - top.masked_fill(top == float("-inf"), 0.0)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
