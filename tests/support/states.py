"""Random states of the operations, and a dense model of the same tokens in float64."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from state_lists import append_with, attend_with, unpack_with
from torch import Tensor

from apack_compile import kernels  # noqa: F401
from apack_compile.kernels.encode import encode
from apack_compile.kernels.format import Bands, StreamBasis, decode
from apack_compile.kernels.heads import to_groups, to_heads
from apack_compile.plan.basis import fit, moments

APPEND, UNPACK = append_with(torch.ops.apack.append), unpack_with(torch.ops.apack.unpack)
ATTEND = attend_with(torch.ops.apack.attend)
IDENTITY = StreamBasis(torch.empty(0), torch.empty(0), torch.empty(0))


@dataclass(frozen=True)
class Shape:
    """What a state looks like; `chunks` are appended after `laid_out` tokens, the last one is the newest; block 0: keys as they come.

    shares: chance of a token to be in each packed segment before text; bands: of K and V of each packed segment.
    """

    batch: int = 2
    heads: int = 2
    groups: int = 1
    head_dim: int = 5
    laid_out: int = 23
    spare: int = 40
    tail: int = 6
    chunks: tuple[int, ...] = (3, 4, 1)
    bands: tuple[tuple[int, int, int, int], ...] = ((2, 1, 3, 2), (0, 0, 4, 3), (1, 0, 4, 0), (0, 5, 0, 0))
    shares: tuple[float, ...] = (0.4,)
    scope: str = "model"
    token_scale: bool = True
    padding: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    block: int = 0


@dataclass
class State:
    """Arguments of the operations, and the dense model: exact tokens, expected tokens, which positions are real."""

    key: Tensor
    value: Tensor
    dense: list[Tensor]
    codes: list[Tensor]
    bases: list[Tensor]
    bands: list[int]
    positions: list[Tensor]
    cursor: Tensor
    expected: list[Tensor]
    real: Tensor
    generator: torch.Generator
    packed: int
    rotated: dict

    @property
    def stored(self) -> tuple:
        return self.dense, self.codes, self.bases, self.bands, self.positions, self.cursor

    @property
    def appended(self) -> tuple:
        return self.dense[2:] + self.codes[-4:], self.bases[-6:], self.bands[-8:], self.cursor

    @property
    def rotated_text(self) -> dict:
        return {"text_rotations": self.rotated["rotations"][-1], "block": self.rotated["block"]} if self.rotated else {}

    @property
    def held(self) -> int:
        return int(self.cursor[0])


def padded_indices(flags: Tensor) -> Tensor:
    """Indices of the set flags of each row, in order, padded with -1."""
    rows = [row.nonzero().flatten() for row in flags]
    most = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, most - len(row)), value=-1) for row in rows])


def rotation_tables(shape: Shape, index: list[Tensor], generator: torch.Generator) -> dict:
    """Random rotations for the blocks of slots of each packed segment; none when the shape has no block."""
    if not shape.block:
        return {}
    pairs = int(torch.randint(1, shape.head_dim // 2 + 1, (), generator=generator))
    angles = [
        torch.rand(shape.batch, (count.shape[1] + shape.spare) // shape.block + 1, pairs, generator=generator) * 7
        for count in index[1:]
    ]
    dtype = torch.promote_types(shape.dtype, torch.float32)
    return {"rotations": [torch.stack([a.cos(), a.sin()], dim=2).to(dtype) for a in angles], "block": shape.block}


def rotation(rotations: dict, segment: int, batch: int, slot: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[P]` of one slot of a packed segment; -1 is text."""
    return rotations["rotations"][segment][batch, slot // rotations["block"]]


def rotated(x: Tensor, by: tuple[Tensor, Tensor], sign: int) -> Tensor:
    """Heads `[H, D]` rotated pair by pair."""
    x, pairs = x.clone(), len(by[0])
    for i in range(pairs):
        one, other = x[:, i].clone(), x[:, i + pairs].clone()
        x[:, i] = one * by[0][i] - sign * other * by[1][i]
        x[:, i + pairs] = other * by[0][i] + sign * one * by[1][i]
    return x


def each_slot(x: Tensor, rotations: dict, segment: int, slots: list[int], sign: int) -> Tensor:
    """Keys `[B, H, n, D]` of the given slots, rotated one by one."""
    if not rotations:
        return x
    x = x.clone()
    for b in range(len(x)):
        for i, slot in enumerate(slots):
            x[b, :, i] = rotated(x[b, :, i], rotation(rotations, segment, b, slot), sign)
    return x


def build(shape: Shape) -> State:
    """A state after the laid out tokens, before any append."""
    generator = torch.Generator().manual_seed(shape.seed)
    batch, n = shape.batch, shape.laid_out
    tokens = [torch.randn(batch, shape.heads, n, shape.head_dim, generator=generator) + 0.5 for _ in range(2)]
    tokens = [x.to(shape.dtype) for x in tokens]
    starts = torch.randint(0, 4, (batch, 1), generator=generator) if shape.padding else torch.zeros(batch, 1)
    real = torch.arange(n) >= starts
    first = real & (real.cumsum(1) <= 4)
    members, left = [first], real & ~first
    for share in shape.shares:
        members.append((torch.rand(batch, n, generator=generator) < share) & left)
        left = left & ~members[-1]
    index = [padded_indices(flags) for flags in (*members, left)]

    def gathered(x: Tensor, where: Tensor) -> Tensor:
        return x.gather(2, where.clamp_min(0)[:, None, :, None].expand(-1, shape.heads, -1, shape.head_dim))

    dense = [gathered(x, index[0]) for x in tokens]
    dense += [x.new_zeros(batch, shape.heads, shape.tail, shape.head_dim) for x in tokens]
    codes, bases, bands = [], [], []
    rotations = rotation_tables(shape, index, generator)
    expected = [torch.where(first[:, None, :, None], x, 0) for x in tokens]
    for i in range(2 * len(index) - 2):
        segment = 1 + i // 2
        x, slots = gathered(tokens[i % 2], index[segment]), list(range(index[segment].shape[1]))
        by = {} if i % 2 else rotations
        x = to_groups(each_slot(x, by, i // 2, slots, -1), shape.groups)
        count = Bands(shape.bands[i])
        if shape.scope == "as is":
            basis, count = IDENTITY, Bands()
        else:
            sample = to_groups(tokens[i % 2], shape.groups)
            if shape.scope == "model":
                sample = sample.transpose(0, 1).flatten(1, 2)[None]
            basis = fit(moments(sample)).basis(count)
        stored, scale = encode(x, basis, count, shape.token_scale)
        decoded = to_heads(decode(stored, scale, basis, count, shape.dtype), shape.heads)
        decoded = each_slot(decoded, by, i // 2, slots, 1)
        for b in range(batch):
            for slot, position in enumerate(index[segment][b].tolist()):
                if position >= 0:
                    expected[i % 2][b, :, position] = decoded[b, :, slot]
        if segment == len(index) - 1:
            stored, scale = (
                torch.cat([s, s.new_zeros(*s.shape[:2], shape.spare, *s.shape[3:])], 2) if s.dim() > 1 else s
                for s in (stored, scale)
            )
        codes += [stored, scale]
        bases += list(basis)
        bands += list(count.counts)
    new = torch.arange(n, n + shape.spare).expand(batch, -1)
    positions = [*index[:-1], torch.cat([index[-1], new], 1)]
    positions = [p.to(torch.int32) for p in positions]
    cursor = torch.tensor([n, n, n - index[-1].shape[1]])
    none = tokens[0][:, :, :0]
    return State(none, none, dense, codes, bases, bands, positions, cursor, expected, real, generator, n, rotations)


def append(state: State, shape: Shape, count: int) -> None:
    """Append `count` random tokens, and to the dense model as well."""
    size = (shape.batch, shape.heads, count, shape.head_dim)
    state.key, state.value = (torch.randn(size, generator=state.generator).to(shape.dtype) for _ in range(2))
    APPEND(state.key, state.value, *state.appended, **state.rotated_text)
    held, packed = state.held, int(state.cursor[1])
    for i, new in enumerate((state.key, state.value)):
        exact = torch.cat([state.expected[i], new], dim=2)
        pushed = slice(state.packed, packed)
        if pushed.stop > pushed.start:
            basis, bands = (
                StreamBasis(*state.bases[-6:][3 * i : 3 * i + 3]),
                Bands(tuple(state.bands[-8:][4 * i : 4 * i + 4])),
            )
            by = {} if i else state.rotated
            slots = [position - int(state.cursor[2]) for position in range(pushed.start, pushed.stop)]
            leaving = each_slot(exact[:, :, pushed], by, -1, slots, -1)
            coded = encode(to_groups(leaving, shape.groups), basis, bands, shape.token_scale)
            back = to_heads(decode(*coded, basis, bands, shape.dtype), shape.heads).clone()
            exact[:, :, pushed] = each_slot(back, by, -1, slots, 1)
        state.expected[i] = exact
    state.packed = packed
    state.real = torch.nn.functional.pad(state.real, (0, held - state.real.shape[1]), value=True)


def filled(shape: Shape) -> State:
    """A state after all chunks."""
    state = build(shape)
    for count in shape.chunks:
        append(state, shape, count)
    return state


def attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, added: Tensor | float, scale: float | None
) -> Tensor:
    """Softmax attention in the dtype of its inputs; `allowed` `[B, 1|H_q, 1|rows, T]`."""
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    score = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale) + added
    weights = score.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights @ value


def allowed_by(state: State, tokens: int, rows: int) -> Tensor:
    """Who may attend whom without a mask, `[B, 1, rows, tokens]`."""
    real = torch.nn.functional.pad(state.real, (0, tokens - state.held))[:, None, None]
    n = state.key.shape[2]
    if rows != n:
        return real.expand(-1, 1, rows, -1)
    return real & (torch.arange(tokens) <= state.held - n + torch.arange(n)[:, None])


# One to three packed segments, each of them empty in some.
SHARES = st.sampled_from(((), (0.4,), (0.0,), (1.0,), (0.3, 0.4), (0.0, 0.4), (0.4, 0.0), (0.5, 1.0), (1.0, 0.0)))


@st.composite
def shapes(draw) -> Shape:
    heads, groups = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2))))
    head_dim = draw(st.sampled_from((3, 5, 8)))
    width = heads // groups * head_dim
    quarters = st.integers(0, width // 4)
    shares = draw(SHARES)
    streams = 2 * len(shares) + 2
    bands = tuple(tuple(draw(st.permutations([1, *(draw(quarters) for _ in range(3))]))) for _ in range(streams))
    bands = tuple(b if sum(b) <= width else (0, 0, 1, 0) for b in bands)
    chunks = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    return Shape(
        batch=draw(st.sampled_from((1, 3))),
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        laid_out=draw(st.integers(5, 30)),
        spare=45,
        tail=draw(st.sampled_from((0, 1, 3, 8))),
        chunks=chunks,
        bands=bands,
        shares=shares,
        scope=draw(st.sampled_from(("model", "sequence", "as is"))),
        token_scale=draw(st.booleans()),
        padding=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
        block=draw(st.sampled_from((0, 1, 4, 7))),
    )
