"""The packed state of a program's caches, as buffers of a module."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import StreamBasis
from apack_compile.kernels.heads import to_groups
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.plan import StreamPlan
from apack_compile.plan.rotation import KeyRotation, rotations_of_blocks

# Where a packed program keeps it: `packed_cache.<layer>` of each cache, `packed_cache.slots_<i>` of each set of slot positions.
ROOT = "packed_cache"
FIRST = ("first_key", "first_value")
TAIL = ("tail_key", "tail_value")
CODES = ("key_codes", "key_scale", "value_codes", "value_scale")
BASES = ("key_mean", "key_decoder", "key_step", "value_mean", "value_decoder", "value_step")
CURSOR = "cursor"
POSITIONS = ("first_positions", "text_positions")
ROTATIONS = ("text_rotations",)


def buffer_name(tensor: str) -> str:
    """The buffer that holds a tensor of the state (kernels/state.py, `Layout.tensor_names`)."""
    if tensor == "text_rotations":
        return ROTATIONS[0]
    return tensor.removeprefix("text_") if tensor.startswith(("text_key", "text_value")) else tensor


@dataclass(frozen=True)
class CachePlan:
    """How one cache is packed: its key and value streams with their bases, newest and first tokens kept dense, head groups, rotation."""

    streams: tuple[StreamPlan, StreamPlan]
    bases: tuple[StreamBasis, StreamBasis]
    tail_slots: int
    first_tokens: int
    groups: int = 1
    rotation: KeyRotation | None = None

    @property
    def keeps_tokens(self) -> bool:
        """Whether tokens are stored as they are, in the model's dtype."""
        return self.streams[0].scope == "as_is"


NO_BASIS = StreamBasis(*(torch.empty(0) for _ in range(3)))
LOSSLESS = CachePlan((StreamPlan("as_is"),) * 2, (NO_BASIS,) * 2, tail_slots=0, first_tokens=0)


class Held(nn.Module):
    """Named tensors, as buffers; `empty`: those without elements, which torch.export.save cannot write."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.empty = {name: tensor for name, tensor in tensors.items() if tensor.numel() == 0}
        for name, tensor in tensors.items():
            if name not in self.empty:
                self.register_buffer(name, tensor)


def slots_key(size: tuple[int, int, int], plan: CachePlan, device: torch.device) -> tuple:
    """What caches must agree on to share positions and rotations: batch, slots, first tokens, device, rotation."""
    batch, _, tokens = size
    rotation = None if plan.rotation is None else (plan.rotation.block, *plan.rotation.frequencies.tolist())
    return batch, tokens - plan.tail_slots, plan.first_tokens, str(device), rotation


def empty_cache(key: Tensor, value: Tensor, plan: CachePlan) -> Held:
    """Empty state for the buffers `[B, H_kv, T, D]` that `key` and `value` look at; raises ValueError where there is no room to pack."""
    batch, heads, tokens, _ = key.shape
    if tokens - plan.tail_slots < 1:
        raise ValueError(f"plan: its {plan.tail_slots} dense newest tokens fill a cache of {tokens}")
    dense = key.dtype if plan.keeps_tokens or key.dtype.itemsize == 2 else torch.float16
    tensors: dict[str, Tensor] = {}
    for name, count in ((FIRST, plan.first_tokens), (TAIL, plan.tail_slots)):
        for stream, states in zip(name, (key, value), strict=True):
            tensors[stream] = states.new_zeros((batch, heads, count, states.shape[3]), dtype=dense)
    codes: list[Tensor] = []
    slots = tokens - plan.tail_slots
    for stream_plan, basis, states in zip(plan.streams, plan.bases, (key, value), strict=True):
        where = [t.to(states.device) for t in basis]
        x = to_groups(states.new_zeros((batch, heads, 0, states.shape[3])), plan.groups)
        coded, _ = encode(x, StreamBasis(*where), stream_plan.bands)
        dtype = dense if stream_plan.scope == "half" else coded.dtype
        scale = (batch, plan.groups, slots) if stream_plan.token_scale else (0,)
        codes.append(torch.zeros(batch, plan.groups, slots, coded.shape[3], dtype=dtype, device=states.device))
        codes.append(torch.zeros(scale, dtype=torch.float16, device=states.device))
    tensors |= dict(zip(CODES, codes, strict=True))
    bases = [t.to(key.device, copy=True) for basis in plan.bases for t in basis]
    tensors |= dict(zip(BASES, bases, strict=True))
    tensors[CURSOR] = torch.zeros(3, dtype=torch.int64, device=key.device)
    return Held(tensors)


def slot_positions(key: Tensor, plan: CachePlan) -> Held:
    """Positions of the slots of first and of text; rotations of text where keys are rotated back."""
    batch, _, tokens, _ = key.shape
    first = torch.arange(plan.first_tokens, dtype=torch.int32, device=key.device)
    text = torch.arange(tokens - plan.tail_slots, dtype=torch.int32, device=key.device)
    positions = [first, torch.where(text < plan.first_tokens, -1, text)]
    rows = [where.expand(batch, -1).contiguous() for where in positions]
    tensors = dict(zip(POSITIONS, rows, strict=True))
    if plan.rotation is not None:
        start = TokenCoordinates.starting_at(torch.zeros(batch, 1, device=key.device))
        tensors |= dict(
            zip(ROTATIONS, [rotations_of_blocks(text.expand(batch, -1), start, plan.rotation)], strict=True)
        )
    return Held(tensors)
