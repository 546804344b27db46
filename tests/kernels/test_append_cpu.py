"""The compiled append of CPUs against the reference: the same tail and cursor, codes that decode to the same tokens."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_lists import append_with
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.append import cpu
from apack_compile.kernels.append import reference as append_reference
from apack_compile.kernels.format import Bands, StreamBasis, decode

pytestmark = pytest.mark.skipif(native.COMPILED is None, reason=f"the compiled operations are {native.STATUS}")

append, reference = append_with(cpu.append), append_with(append_reference.append)
SETS = native.SETS
CAPACITY = 60


@dataclass(frozen=True)
class Case:
    """Bands of text K and V, None for tokens as they are; `chunks` are appended one after another."""

    batch: int = 1
    heads: int = 2
    groups: int = 1
    dims: tuple[int, int] = (16, 12)
    tail: int = 4
    chunks: tuple[int, ...] = (3, 4, 1, 1)
    bands: tuple[tuple[int, int, int, int] | None, ...] = ((3, 5, 7, 9), (0, 0, 16, 0))
    scope: str = "model"
    token_scale: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    block: int = 0


def rotations_of(case: Case) -> dict:
    """Random rotations of the text slots' blocks."""
    if not case.block:
        return {}
    g = torch.Generator().manual_seed(case.seed + 2)
    angles = torch.randn(case.batch, CAPACITY // case.block + 1, case.dims[0] // 3, generator=g)
    return {"text_rotations": torch.stack([angles.cos(), angles.sin()], 2), "block": case.block}


def build(case: Case) -> tuple[list[Tensor], list[Tensor], list[int], Tensor]:
    """Arguments of append after the new tokens; codes and scales start as garbage."""
    g = torch.Generator().manual_seed(case.seed)
    stores = [torch.zeros(case.batch, case.heads, case.tail, dim, dtype=case.dtype) for dim in case.dims]
    bases: list[Tensor] = []
    bands: list[int] = []
    for dim, kept in zip(case.dims, case.bands, strict=True):
        width = case.heads // case.groups * dim
        if kept is None:
            stores += [torch.zeros(case.batch, case.groups, CAPACITY, width, dtype=case.dtype), torch.empty(0).half()]
            bases += [torch.empty(0)] * 3
            bands += [0] * 4
            continue
        count = Bands(kept).at_most(width)
        shared = 1 if case.scope == "model" else case.batch
        kind = torch.float32 if case.scope == "model" else torch.float16
        rows = torch.linalg.qr(torch.randn(shared, case.groups, width, width, generator=g)).Q[:, :, : count.components]
        mean = torch.randn(shared, case.groups, width, generator=g)
        step = [s for n, s in zip(count.counts, (1.0, 0.03, 0.3, 1.0), strict=True) for _ in range(n)]
        steps = (torch.rand(shared, case.groups, count.components, generator=g) + 0.5) * torch.tensor(step)
        bases += [mean.to(kind), rows.contiguous().to(kind), steps]
        bands += list(count.counts)
        codes = torch.randint(0, 256, (case.batch, case.groups, CAPACITY, count.token_bytes), generator=g)
        scale = torch.zeros(case.batch, case.groups, CAPACITY) if case.token_scale else torch.empty(0)
        stores += [codes.to(torch.uint8), scale.half()]
    return stores, bases, bands, torch.tensor([7, 7, 7])


def decoded(stores: list[Tensor], bases: list[Tensor], bands: list[int], slots: int) -> list[Tensor]:
    """The text segment's tokens."""
    found = []
    for i in range(2):
        codes, scale = stores[2 + 2 * i], stores[3 + 2 * i]
        scale = scale[:, :, :slots] if scale.dim() > 1 else scale
        n16, n8, n4, n2 = bands[4 * i : 4 * i + 4]
        basis = StreamBasis(*bases[3 * i : 3 * i + 3])
        found.append(decode(codes[:, :, :slots], scale, basis, Bands((n16, n8, n4, n2)), torch.float64))
    return found


@st.composite
def cases(draw) -> Case:
    heads, groups = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1), (4, 2))))
    count = st.integers(0, 21)
    bands = st.one_of(st.none(), st.tuples(count, count, count, count))
    return Case(
        batch=draw(st.sampled_from((1, 3))),
        heads=heads,
        groups=groups,
        dims=draw(st.sampled_from(((16, 16), (3, 5), (33, 72), (80, 8)))),
        tail=draw(st.sampled_from((0, 1, 4, 32))),
        chunks=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))),
        bands=(draw(bands), draw(bands)),
        scope=draw(st.sampled_from(("model", "sequence"))),
        token_scale=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        seed=draw(st.integers(0, 10**6)),
        block=draw(st.sampled_from((0, 1, 7, 32))),
    )


def assert_appends_like_the_reference(case: Case) -> None:
    own, wanted = build(case), build(case)
    g = torch.Generator().manual_seed(case.seed + 1)
    for n in case.chunks:
        states = [torch.randn(case.batch, n, case.heads, dim, generator=g) for dim in case.dims]
        key, value = (x.to(case.dtype).transpose(1, 2) for x in states)
        append(key, value, *own, **rotations_of(case))
        reference(key, value, *wanted, **rotations_of(case))
    assert torch.equal(own[3], wanted[3])
    for got, expected in zip(own[0][:2], wanted[0][:2], strict=True):
        assert torch.equal(got, expected)
    slots = int(own[3][1] - own[3][2])
    pairs = zip(decoded(*own[:3], slots), decoded(*wanted[:3], slots), strict=True)
    for i, (got, expected) in enumerate(pairs):
        # what lies within rounding of a boundary between two levels may take either
        differs = (got - expected).abs().flatten(0, -2).amax(-1) > 1e-2
        assert differs.double().mean() <= 0.1 if slots > 9 else differs.sum() <= 1
        rest = own[0][2 + 2 * i][:, :, slots:], wanted[0][2 + 2 * i][:, :, slots:]
        assert torch.equal(*rest)


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_append_writes_what_the_reference_writes(instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)
    settings(max_examples=100, deadline=None)(given(cases())(assert_appends_like_the_reference))()


def test_a_wide_stream_is_encoded_by_several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_appends_like_the_reference(
            Case(heads=8, dims=(128, 128), tail=2, bands=((0, 64, 128, 500), (64, 0, 0, 0)))
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tail", (0, 4))
def test_a_full_cache_raises_and_stays_as_it_was(tail):
    case = Case(tail=tail, chunks=())
    stores, bases, bands, cursor = build(case)
    states = [torch.randn(1, 2, CAPACITY + tail + 1, dim) for dim in case.dims]
    before = [x.clone() for x in (*stores, cursor)]
    with pytest.raises(IndexError, match="no free slot"):
        append(*states, stores, bases, bands, cursor)
    for x, saved in zip((*stores, cursor), before, strict=True):
        assert torch.equal(x, saved)
