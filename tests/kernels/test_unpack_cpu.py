"""The compiled unpack of CPUs against the reference in float64: random states, garbage in unused slots, guarded memory."""

import mmap
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_calls import Case, build, cases, guarded
from state_lists import unpack_with
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.unpack import cpu
from apack_compile.kernels.unpack import reference as unpack_reference

pytestmark = pytest.mark.skipif(native.COMPILED is None, reason=f"the compiled operations are {native.STATUS}")

unpack, reference = unpack_with(cpu.unpack), unpack_with(unpack_reference.unpack)
SETS = native.SETS
KEY, VALUE, DENSE, CODES, BASES, BANDS, POSITIONS, CURSOR, TOKENS = range(9)


def arguments_of(case: Case, spare: int = 3) -> tuple[list, dict]:
    """Arguments of unpack, in order, and rotations by name; room for `spare` tokens more than are held."""
    call = build(replace(case, mask="none", tiers=False))
    _, key, value, _, *state, _ = call.arguments
    return [key, value, *state, int(state[CURSOR - DENSE][0]) + spare], call.rotations


def in_dtype(arguments: list, dtype: torch.dtype) -> list:
    """The same call with new tokens, and so the result, in another dtype."""
    return [arguments[KEY].to(dtype), arguments[VALUE].to(dtype), *arguments[DENSE:]]


def is_packed(arguments: list) -> Tensor:
    """Which positions `[B, T]` the packed segments hold."""
    new, cursor = arguments[KEY].shape[2], arguments[CURSOR]
    end = min(int(cursor[1]), int(cursor[0]) - new)
    packed = torch.zeros(arguments[KEY].shape[0], arguments[TOKENS], dtype=torch.bool)
    for where in arguments[POSITIONS][1:]:
        for row, slots in zip(packed, where, strict=True):
            row[slots[(slots >= 0) & (slots < end)].long()] = True
    return packed


def assert_close_to_float64(arguments: list, rotations: dict) -> None:
    """No further from the reference in float64 than the reference in the call's own dtype, times a small constant; copies are equal."""
    own = unpack(*arguments, **rotations)
    exact = reference(*in_dtype(arguments, torch.float64), **rotations)
    plain = reference(*arguments, **rotations)
    packed = is_packed(arguments)[:, None, :, None]
    for got, wanted, rounded in zip(own, exact, plain, strict=True):
        assert got.dtype == rounded.dtype and got.shape == rounded.shape and got.is_contiguous()
        assert torch.equal(got.masked_fill(packed, 0), rounded.masked_fill(packed, 0))
        if not got.numel():
            continue
        error, allowed = ((x.double() - wanted).abs().max() for x in (got, rounded))
        assert error <= 4 * allowed + 4 * torch.finfo(got.dtype).eps * wanted.abs().max()


@pytest.fixture(autouse=True)
def poisoned_scratch(poisoned):
    """New tensors start as NaN, and the operation's scratch memory holds what a call with bases of NaN left there."""
    arguments, _ = arguments_of(Case(batch=4, heads=8, text=2000, bands=((64, 0, 0, 0),) * 4, empty=0.0))
    arguments[BASES] = [torch.full_like(x, float("nan")) for x in arguments[BASES]]
    assert unpack(*arguments)[0][:, :, :1000].isnan().any(-1).double().mean() > 0.9


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_unpack_is_as_close_to_float64_as_the_reference(instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)

    @settings(max_examples=120, deadline=None)
    @given(cases(), st.sampled_from((0, 1, 70)), st.sampled_from((0, 0, 1, 7, 64)))
    @example(Case(vision=0, text=0, tail=0), 0, 0)
    @example(Case(vision=65, text=64, block=16), 0, 5)
    @example(
        Case(heads=4, groups=2, head_dim=72, value_dim=80, bands=(None, (0, 0, 0, 64), (16, 0, 0, 0), None)), 1, 36
    )
    def check(case: Case, spare: int, pairs: int) -> None:
        arguments, rotations = arguments_of(case, spare)
        assert_close_to_float64(arguments, {**rotations, "interleaved_pairs": min(pairs, case.head_dim // 2)})

    check()


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("length", (0, 1, 63, 64, 65, 511, 513))
@pytest.mark.parametrize("third", (False, True), ids=("two segments", "three segments"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_lengths_around_a_block_and_a_piece(length, dtype, third, instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)
    bands = ((3, 5, 17, 30), (0, 0, 16, 16), (1, 0, 7, 33), (0, 9, 0, 0), (0, 0, 5, 11), (0, 2, 0, 20))
    case = Case(
        batch=2,
        heads=3,
        groups=1,
        coarse=abs(length - 1) if third else None,
        vision=length,
        text=length + 1,
        bands=bands,
        empty=0.0,
        dtype=dtype,
        block=64,
    )
    assert_close_to_float64(*arguments_of(case))


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("head_dim", (1, 66, 130, 300))
def test_wide_streams_run_in_several_panels_and_tiles(head_dim, instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)
    bands = ((16, 48, 100, 200), (64, 0, 0, 100), (0, 65, 0, 0), (0, 0, 80, 0))
    heads, block = (6, 48) if head_dim > 1 else (400, 0)
    case = Case(
        heads=heads, groups=2, head_dim=head_dim, value_dim=head_dim, vision=70, text=130, bands=bands, block=block
    )
    assert_close_to_float64(*arguments_of(case))


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_number_of_threads_changes_nothing(threads):
    case = Case(batch=2, heads=3, vision=900, text=2100, block=32)
    wanted = unpack(*(made := arguments_of(case))[0], **made[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = unpack(*made[0], **made[1])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_tokens_kept_as_they_are_come_back_bit_by_bit(dtype):
    arguments, _ = arguments_of(Case(batch=2, vision=70, text=130, bands=(None,) * 4, dtype=dtype))
    for got, wanted in zip(unpack(*arguments), reference(*arguments), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_relative_keys_kept_as_they_are_are_rotated(instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)
    arguments, rotations = arguments_of(Case(vision=70, text=130, block=16))
    as_they_are, _ = arguments_of(Case(vision=70, text=130, bands=(None,) * 4))
    arguments[CODES : BANDS + 1] = as_they_are[CODES : BANDS + 1]
    assert_close_to_float64(arguments, rotations)
    assert not torch.equal(unpack(*arguments, **rotations)[0], unpack(*arguments)[0])


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_a_dense_dtype_other_than_the_models_is_converted(instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)
    arguments, rotations = arguments_of(Case(dtype=torch.float16, vision=65, tail=32))
    for dtype in (torch.float32, torch.bfloat16):
        assert_close_to_float64(in_dtype(arguments, dtype), rotations)


def test_strides_do_not_matter():
    arguments, rotations = arguments_of(Case(batch=2, vision=40, block=32))

    def spread(x):
        if isinstance(x, list):
            return [spread(y) for y in x]
        if not isinstance(x, Tensor) or x.dim() < 2:
            return x
        wide = x.new_zeros(*x.shape[:-2], x.shape[-2] * 2, x.shape[-1] * 3)
        wide[..., ::2, ::3] = x
        return wide[..., ::2, ::3]

    wanted = unpack(*arguments, **rotations)
    got = unpack(*spread(arguments), **{name: spread(x) for name, x in rotations.items()})
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_float64_gets_the_reference():
    arguments, rotations = arguments_of(Case(vision=65, block=16))
    arguments = in_dtype(arguments, torch.float64)
    for got, wanted in zip(unpack(*arguments, **rotations), reference(*arguments, **rotations), strict=True):
        assert torch.equal(got, wanted)


def test_more_tokens_than_there_is_room_for_are_refused():
    arguments, rotations = arguments_of(Case(), spare=-1)
    with pytest.raises(IndexError, match=rf"tokens={arguments[TOKENS]} must be at least .* {arguments[TOKENS] + 1}"):
        unpack(*arguments, **rotations)


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="needs mprotect")
@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_past_the_end_of_a_tensor_is_read(seed, instructions, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instructions)
    sizes = ((64, 16), (72, 80), (3, 5), (33, 128), (80, 72), (16, 8))[seed]
    odd = ((3, 1, 3, 3), (0, 0, 1, 0), None, (0, 0, 0, 1), (1, 0, 0, 0), (0, 3, 0, 0))
    case = Case(
        batch=2, head_dim=sizes[0], value_dim=sizes[1], vision=65, text=67, tail=3, empty=0.0, seed=seed,
        bands=tuple(odd[(seed + i) % 6] for i in range(4)), scope=("model", "sequence")[seed % 2],
        dtype=(torch.float32, torch.bfloat16)[seed // 3], block=(0, 16, 64)[seed % 3],
    )  # fmt: skip
    arguments, rotations = arguments_of(case)
    rotations["interleaved_pairs"] = seed % 2 * (sizes[0] // 2)
    keep: list = []

    def placed(x):
        if isinstance(x, list):
            return [placed(y) for y in x]
        return guarded(x.contiguous(), keep) if isinstance(x, Tensor) and x.numel() else x

    wanted = unpack(*arguments, **rotations)
    got = unpack(*placed(arguments), **{name: placed(x) for name, x in rotations.items()})
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
