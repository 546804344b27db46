"""`apack::attend` and `apack::attend_tiers` on CUDA, in Triton.

Four launches: queries into latents, one pass over all segments, the splits into one, latents into outputs. Where a segment's value
components need more registers than there are, further passes over the values follow the first, which leaves its scores. Importance comes
from those scores too. Nothing waits for the device, and shapes alone choose every launch: a decode step can be captured in a CUDA graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apack_compile.kernels.attend import reference
from apack_compile.kernels.attend.triton_call import Call
from apack_compile.kernels.attend.triton_softmax import LOG2E
from apack_compile.kernels.state import TEXT, VISION, PackedState, check_tiers

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def serves(query: Tensor, state: PackedState) -> bool:
    """Whether the kernels take these: 16- or 32-bit queries, keys and values of a segment both packed or both kept as they are.

    Relative keys only where they are packed, and whole tiles of tokens share an anchor: blocks of 16, 32, 64 and so on.
    """
    block, segments = state.block, state.segments
    alike = all(segment.key.as_is == segment.value.as_is for segment in segments)
    streams = [stream for segment in segments for stream in (segment.key, segment.value)]
    one_grouping = len({stream.groups for stream in streams if not stream.as_is}) <= 1
    in_tiles = not block or (block >= 16 and block.bit_count() == 1 and not any(s.key.as_is for s in segments))
    return query.dtype in DTYPES and alike and one_grouping and in_tiles


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
    """As `reference.attend`, which also serves here what `serves` says no to (float64, a segment half packed, an odd block)."""
    held = PackedState.parse(state, layout)
    if tiers is not None:
        slots = [segment.slots for segment in held.segments]
        check_tiers(held.layout.kinds, slots, len(key), vision_importance, text_importance)
    if not serves(query, held):
        return reference.attend(
            query, key, value, mask, state, layout, scale, vision_importance, text_importance, tiers, partial, ema
        )
    importance = {VISION: vision_importance, TEXT: text_importance}
    wanted = {segment for segment, known in importance.items() if known is not None and known.numel()}
    with torch.cuda.device_of(query):
        call = Call(query, key, value, held, wanted, tiers)
        # the kernels' scores are in base 2
        scale = LOG2E.value * (query.shape[-1] ** -0.5 if scale is None else scale)
        call.project(scale)
        call.attend(mask, scale, partial)
        out = call.merge()
        keep_and_add = {VISION: (ema or ())[:2], TEXT: (ema or ())[2:]}
        for number, segment in enumerate(held.segments):
            if segment.kind in wanted:
                call.update_importance(number, importance[segment.kind], *keep_and_add[segment.kind])
    return out
