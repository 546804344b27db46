"""Random states and calls of attend and unpack: garbage in slots that hold nothing, guarded memory."""

import ctypes
import mmap
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from apack_compile.kernels.format import Bands


@dataclass(frozen=True)
class Case:
    """A random state and call. vision, text, coarse: slots, None for no such segment; bands of K and V of vision, text and coarse, None
    for tokens as they are."""

    batch: int = 1
    heads: int = 2
    groups: int = 1
    share: int = 2
    head_dim: int = 16
    value_dim: int = 16
    vision: int | None = 0
    text: int = 100
    coarse: int | None = None
    tail: int = 8
    new: int = 1
    grouped: bool = False
    bands: tuple[tuple[int, int, int, int] | None, ...] = (
        (8, 0, 16, 0), (0, 8, 0, 16), (0, 0, 16, 16), (0, 0, 32, 0), (0, 0, 3, 9), (0, 0, 0, 12),
    )  # fmt: skip
    scope: str = "model"
    token_scale: bool = True
    mask: str = "none"
    tiers: bool = False
    partial: int = 5
    empty: float = 0.2
    dtype: torch.dtype = torch.float32
    seed: int = 0
    block: int = 0
    # blocks that share a turn, by pair and over again
    sharing: tuple[int, ...] = (1,)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of the packed segments, in the operations' order."""
        return tuple(slots for slots in (self.coarse, self.vision, self.text) if slots is not None)

    @property
    def streams(self) -> tuple[tuple[int, int, int, int] | None, ...]:
        """Bands of the packed streams, in the operations' order."""
        coarse, vision = () if self.coarse is None else self.bands[4:], () if self.vision is None else self.bands[:2]
        return (*coarse, *vision, *self.bands[2:4])


@dataclass
class Call:
    """Arguments of attend, in order; what says how keys were rotated by name."""

    arguments: list
    tiers: list
    rotations: dict

    def copy(self, dtype: torch.dtype | None = None) -> "Call":
        """The same call on its own memory; with `dtype`, query in that dtype (which is the one the reference computes in)."""
        query, *others = self.arguments
        query = query.clone() if dtype is None else query.to(dtype)
        rotations = {name: _clone(x) for name, x in self.rotations.items()}
        return Call([query, *(_clone(x) for x in others)], [_clone(x) for x in self.tiers], rotations)


def _clone(x):
    if isinstance(x, Tensor):
        return x.clone()
    return [_clone(y) for y in x] if isinstance(x, list) else x


def build(case: Case) -> Call:
    """A random call; slots that hold nothing are full of NaN or 0xFF."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    def chance(share: float, *size: int) -> Tensor:
        return torch.rand(size, generator=g) < share

    batch, heads, dims = case.batch, case.heads, (case.head_dim, case.value_dim)
    stored = 4 + sum(case.slots)
    order = torch.stack([torch.randperm(stored, generator=g) for _ in range(batch)]).to(torch.int32)
    order = order.masked_fill(chance(case.empty, batch, stored), -1)
    positions = list(order.split((4, *case.slots), dim=1))
    in_tail = int(torch.randint(0, case.tail + 1, (), generator=g))
    # some slots hold positions that the cursor does not reach
    packed = stored - int(torch.randint(0, 3, (), generator=g))
    cursor = torch.tensor([packed + in_tail + case.new, packed, 4])
    before = packed + in_tail
    held = [(p >= 0) & (p < packed) for p in positions]
    ring = packed + (torch.arange(case.tail) - packed) % max(case.tail, 1) < before
    held.append(ring.expand(batch, -1))
    dense = []
    for segment in (0, -1):
        for dim in dims:
            x = normal(batch, heads, held[segment].shape[1], dim).to(case.dtype)
            dense.append(x.masked_fill(~held[segment][:, None, :, None], float("nan")))
    codes, bases, bands = [], [], []
    for i, kept in enumerate(case.streams):
        where, dim = held[1 + i // 2], dims[i % 2]
        slots, width = where.shape[1], heads // case.groups * dim
        unused = ~where[:, None, :, None]
        if kept is None:
            codes += [normal(batch, case.groups, slots, width).to(case.dtype).masked_fill(unused, float("nan"))]
            codes += [torch.empty(0, dtype=torch.float16)]
            bases += [torch.empty(0)] * 3
            bands += [0] * 4
            continue
        # rather fewer components than asked for than more than there are
        count = Bands(kept).at_most(width)
        token = torch.randint(0, 256, (batch, case.groups, slots, count.token_bytes), generator=g).to(torch.uint8)
        halves = normal(batch, case.groups, slots, count.counts[0]).half().contiguous()
        token[..., : 2 * count.counts[0]] = halves.view(torch.uint8)
        codes.append(token.masked_fill(unused, 0xFF))
        if case.token_scale:
            scale = (torch.rand(batch, case.groups, slots, generator=g) + 0.5).half()
            codes.append(scale.masked_fill(unused[..., 0], float("nan")))
        else:
            codes.append(torch.empty(0, dtype=torch.float16))
        shared = 1 if case.scope == "model" else batch
        kind = torch.float32 if case.scope == "model" else torch.float16
        rows = normal(shared, case.groups, count.components, width) / width**0.5
        step = [step for n, step in zip(count.counts, (1.0, 0.02, 0.3, 1.0), strict=True) for _ in range(n)]
        spread = torch.rand(shared, case.groups, count.components, generator=g) + 0.5
        bases += [normal(shared, case.groups, width).to(kind) * 0.3, rows.to(kind), spread * torch.tensor(step)]
        bands += list(count.counts)
    rows = case.share * case.new if case.grouped else case.new
    query = normal(batch, heads if case.grouped else heads * case.share, rows, case.head_dim).to(case.dtype)
    key, value = (normal(batch, case.new, heads, dim).to(case.dtype).transpose(1, 2) for dim in dims)
    length = int(cursor[0]) + 2
    mask = None
    if case.mask != "none":
        extent = [full if bool(chance(0.5, 1)) else 1 for full in (batch, query.shape[1], rows)]
        keep = chance(0.7, *extent, length)
        keep[0, 0, 0] = False  # a row that may attend nothing
        mask = keep if case.mask == "bool" else normal(*extent, length).masked_fill(~keep, float("-inf"))
    arguments = [query, key, value, mask, dense, codes, bases, bands, positions, cursor, None]
    rotations: dict = {}
    if case.block and None not in case.streams[::2]:
        pairs = max(case.head_dim // 3, 1)
        sharing = torch.tensor(case.sharing)[torch.arange(pairs) % len(case.sharing)]
        angles = [shared_angles(normal(batch, slots // case.block + 1, pairs), sharing) for slots in case.slots]
        rotations = {"rotations": [torch.stack([a.cos(), a.sin()], 2) for a in angles], "block": case.block}
    if not case.tiers:
        return Call(arguments, [], rotations)
    read = torch.randint(0, case.vision + 1, (batch, 2), generator=g).sort(1).values.to(torch.int32)
    importance = [torch.rand(batch, p.shape[1], generator=g) for p in positions[1:]]
    return Call(arguments, [*importance, read, case.partial, [0.25, 0.75, 1.0, 1.0]], rotations)


def shared_angles(angles: torch.Tensor, sharing: torch.Tensor) -> torch.Tensor:
    """Angles `[B, blocks, P]` where each pair has that of the first of `sharing` `[P]` blocks."""
    blocks = torch.arange(angles.shape[1])[:, None]
    return angles.gather(1, (blocks // sharing * sharing).expand_as(angles))


def without_garbage(call: Call) -> Call:
    """The same call with zeros for NaN and 0xFF where nothing is held, which the reference cannot read in all formats."""
    call = call.copy()
    dense, codes, positions, cursor = (call.arguments[i] for i in (4, 5, 8, 9))
    for x in dense + codes:
        if x.dtype != torch.uint8:
            x.nan_to_num_(0.0)
    for i in range(0, len(codes), 2):
        where = positions[1 + i // 4]
        if codes[i].dtype == torch.uint8:
            codes[i].masked_fill_(((where < 0) | (where >= cursor[1]))[:, None, :, None], 0)
    return call


def guarded(x: Tensor, keep: list) -> Tensor:
    """The same values right before a page that may not be touched."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    out = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * mmap.PAGESIZE - size).view(x.shape)
    return out.copy_(x)


LENGTHS = st.sampled_from((0, 1, 15, 16, 17, 63, 64, 65, 127, 129, 300, 700))


@st.composite
def cases(draw, lengths: st.SearchStrategy[int] = LENGTHS) -> Case:
    """Cases with so many slots in each packed segment, coarse and vision there in half of them."""
    heads, groups = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (5, 1))))
    count = st.integers(0, 40)
    bands = st.one_of(st.none(), st.tuples(count, count, count, count))
    coarse, vision = draw(st.one_of(st.none(), lengths)), draw(st.one_of(st.none(), lengths))
    return Case(
        batch=draw(st.sampled_from((1, 1, 3))),
        heads=heads,
        groups=groups,
        share=draw(st.sampled_from((1, 2, 3, 7))),
        head_dim=draw(st.sampled_from((3, 8, 16, 33, 64, 72, 80, 128))),
        value_dim=draw(st.sampled_from((5, 16, 64, 72, 80))),
        vision=vision,
        text=draw(lengths),
        coarse=coarse,
        tail=draw(st.sampled_from((0, 1, 8, 32))),
        new=draw(st.sampled_from((1, 1, 2, 5))),
        grouped=draw(st.booleans()),
        bands=tuple(draw(bands) for _ in range(6)),
        scope=draw(st.sampled_from(("model", "sequence"))),
        token_scale=draw(st.booleans()),
        mask=draw(st.sampled_from(("none", "bool", "float"))),
        tiers=coarse is None and vision is not None and draw(st.booleans()),
        partial=draw(st.integers(0, 60)),
        empty=draw(st.sampled_from((0.0, 0.2, 1.0))),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        seed=draw(st.integers(0, 10**6)),
        block=draw(st.sampled_from((0, 0, 1, 16, 32, 50, 64, 256))),
        sharing=draw(st.sampled_from(((1,), (99, 1), (99, 99, 1, 2, 4, 99), (99,)))),
    )
