"""Packed segments of batch 1, which all sequences share, beside those of each sequence: as if each had its own copy."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from precision import eps_of
from random_calls import LENGTHS, Call, Case, build, cases, without_garbage
from state_lists import state_of
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.attend import cpu, reference
from apack_compile.kernels.state import DenseSegment, Layout, PackedState, PackedStream
from apack_compile.kernels.unpack import cpu as unpack_cpu
from apack_compile.kernels.unpack import reference as unpack_reference

compiled = pytest.mark.skipif(native.COMPILED is None, reason=f"the compiled operations are {native.STATUS}")
SETS = native.SETS


@dataclass(frozen=True)
class Branches:
    """Query, key and value of new tokens, a mask, and a state whose first and leading packed segments all sequences share."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    state: PackedState

    def by(self, attend, dtype: torch.dtype | None = None, **options) -> Tensor:
        query = self.query if dtype is None else self.query.to(dtype)
        return attend(query, self.key, self.value, self.mask, *self.state.flatten(), None, **options)

    @property
    def copied(self) -> "Branches":
        """The same with a copy for each sequence."""

        def each(x: Tensor) -> Tensor:
            return x.repeat_interleave(len(self.key), 0) if x.dim() > 1 and len(x) == 1 else x

        def stream(x: PackedStream) -> PackedStream:
            return x.with_tokens(each)

        segments = tuple(
            replace(
                s, key=stream(s.key), value=stream(s.value), positions=each(s.positions),
                rotations=None if s.rotations is None else each(s.rotations),
            )
            for s in self.state.segments
        )  # fmt: skip
        first = DenseSegment(each(self.state.first.key), each(self.state.first.value))
        state = replace(self.state, segments=segments, first=first, first_positions=each(self.state.first_positions))
        return replace(self, state=state)


def parts_of(call: Call) -> PackedState:
    return state_of(*call.arguments[4:10], **call.rotations)


def branches_of(case: Case, shared: Case, is_clean: bool = False) -> Branches:
    """A call of one case behind the slots of another one, of batch 1, whose positions come before its own."""
    calls = [build(case), build(shared)]
    own, prefix = (parts_of(without_garbage(call) if is_clean else call) for call in calls)
    # the tail is a ring: its slots keep their tokens where positions move by whole rounds
    around = max(case.tail, 1)
    tokens, end = -(-(4 + sum(shared.slots)) // around) * around, int(prefix.cursor[1])
    here = [s for s in prefix.segments if s.slots]
    segments = [replace(s, positions=s.positions.masked_fill(s.positions >= end, -1)) for s in here]
    segments += [replace(s, positions=torch.where(s.positions < 0, -1, s.positions + tokens)) for s in own.segments]
    query, key, value, mask = calls[0].arguments[:4]
    if mask is not None:
        columns = torch.randint(mask.shape[3], (tokens,), generator=torch.Generator().manual_seed(case.seed))
        mask = torch.cat([mask[..., columns], mask], 3)
    first = prefix.first_positions.masked_fill(prefix.first_positions >= end, -1)
    state = PackedState(
        tuple(segments), prefix.first, first, own.tail, own.cursor + tokens, own.block, own.interleaved_pairs
    )
    return Branches(query, key, value, mask, state)


@st.composite
def both(draw) -> tuple[Case, Case]:
    """Branches, and what they share."""
    own = draw(cases().filter(lambda case: not case.tiers))
    own = replace(own, batch=draw(st.sampled_from((1, 2, 3, 9))), coarse=None)
    lengths = [draw(st.one_of(st.none(), LENGTHS)) for _ in range(2)]
    prefix = replace(own, batch=1, coarse=lengths[0], vision=lengths[1], text=draw(LENGTHS), seed=own.seed + 1, tail=0)
    # relative keys in all segments, or in none
    if own.block and None in (*own.streams[::2], *prefix.streams[::2]):
        own, prefix = replace(own, block=0), replace(prefix, block=0)
    return own, prefix


# nine sequences of 35 rows a group: more than are read at once
MANY = Case(batch=9, heads=5, share=7, text=70, new=1, block=16), Case(heads=5, share=7, text=300, vision=65, block=16)
KEPT = (None,) * 6


@settings(max_examples=60, deadline=None)
@given(both())
def test_the_reference_reads_shared_segments_as_copies(given_cases):
    call = branches_of(*given_cases, is_clean=True)
    torch.testing.assert_close(
        call.by(reference.attend, torch.float64), call.copied.by(reference.attend, torch.float64), atol=1e-12, rtol=1e-9
    )


def assert_close(own: Tensor, call: Branches, eps: float) -> None:
    """No further from copies in float64 than the reference in the call's own dtype, times a small constant."""
    exact, plain = call.copied.by(reference.attend, torch.float64), call.by(reference.attend)
    assert own.shape == exact.shape and own.dtype == call.query.dtype and not own.isnan().any()
    if own.numel():
        error, rounding = ((x.double() - exact).abs().max() for x in (own, plain))
        assert error <= 4 * rounding + 4 * max(torch.finfo(own.dtype).eps, eps) * exact.abs().max()


@compiled
@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_the_compiled_attend_reads_shared_segments_as_copies(instructions):
    @settings(max_examples=120, deadline=None)
    @given(both())
    @example(MANY)
    @example(tuple(replace(case, block=0) for case in MANY))
    @example(tuple(replace(case, block=0, bands=KEPT, mask="bool", new=2) for case in MANY))
    @example(tuple(replace(case, mask="float", grouped=True, new=2, groups=5) for case in MANY))
    def check(given_cases: tuple[Case, Case]) -> None:
        own = branches_of(*given_cases).by(partial(cpu.attend, instructions=instructions))
        assert_close(own, branches_of(*given_cases, is_clean=True), eps_of(given_cases[0].dtype, instructions))

    check()


@compiled
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_shared_segments_on_several_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for text in (65, 2100):
            case, shared = (replace(case, empty=0.0) for case in MANY)
            shared = replace(shared, text=text)
            own = branches_of(case, shared).by(cpu.attend)
            assert_close(own, branches_of(case, shared, is_clean=True), eps_of(torch.float32))
    finally:
        torch.set_num_threads(before)


# few: Triton's interpreter takes seconds for each
@settings(max_examples=8, deadline=None)
@given(both())
@example(tuple(replace(case, heads=2) for case in MANY))
def test_triton_reads_shared_segments_as_copies(device, given_cases):
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from apack_compile.kernels.attend import triton

    call = branches_of(*given_cases, is_clean=True)
    state, layout = call.state.flatten()
    given_state = [x.to(device) for x in state]
    mask = None if call.mask is None else call.mask.to(device)
    query, key, value = (x.to(device) for x in (call.query, call.key, call.value))
    assert_close(
        triton.attend(query, key, value, mask, given_state, layout, None).cpu(), call, torch.finfo(torch.float16).eps
    )


@compiled
@settings(max_examples=40, deadline=None)
@given(both())
def test_unpack_gives_every_sequence_the_shared_tokens(given_cases):
    call = branches_of(*given_cases, is_clean=True)
    tokens = int(call.state.cursor[0])
    wanted = unpack_reference.unpack(call.key, call.value, *call.copied.state.flatten(), tokens)
    plain = unpack_reference.unpack(call.key, call.value, *call.state.flatten(), tokens)
    own = unpack_cpu.unpack(call.key, call.value, *call.state.flatten(), tokens)
    for got, same, expected in zip(own, plain, wanted, strict=True):
        # products of another batch may be summed in another order
        torch.testing.assert_close(same, expected)
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("kinds", "fits"),
    (
        ((2,), True),
        ((0, 1, 2, 1, 2), True),
        ((2, 2), True),
        ((1, 2, 2), True),
        ((2, 0, 1, 2), True),
        ((2, 2, 2), False),
        ((1, 2, 1), False),
        ((0, 1, 2, 0, 1, 2), False),
    ),
    ids=str,
)
def test_a_layout_has_the_segments_of_a_prefix_before_its_own(kinds, fits):
    words = [1, 0, 0] + [word for kind in kinds for word in (kind, *[1] * 8)]
    if not fits:
        with pytest.raises(ValueError, match="layout: "):
            Layout.parse(words)
        return
    names = Layout.parse(words).tensor_names()
    assert len(set(names)) == len(names)


def test_names_of_a_prefix_say_so():
    kinds = (1, 2, 2)
    words = [1, 4, 0] + [word for kind in kinds for word in (kind, *[1] * 8)]
    names = Layout.parse(words).tensor_names()
    assert {"prefix_vision_key_codes", "prefix_text_rotations", "text_value_step"} <= set(names)
