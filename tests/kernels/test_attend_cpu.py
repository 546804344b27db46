"""The compiled attend of CPUs against the reference in float64: random states, garbage in unused slots, guarded memory."""

import mmap
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from precision import eps_of
from random_calls import Call, Case, build, cases, guarded, without_garbage
from state_lists import attend_with
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.attend import cpu
from apack_compile.kernels.attend import reference as attend_reference

pytestmark = pytest.mark.skipif(native.COMPILED is None, reason=f"the compiled operations are {native.STATUS}")

attend, reference = attend_with(cpu.attend), attend_with(attend_reference.attend)
SETS = native.SETS


def attend_on(instructions: int) -> Callable[..., Tensor]:
    """`attend` by one instruction set."""
    return attend_with(partial(cpu.attend, instructions=instructions))


def run(function, call: Call) -> list[Tensor]:
    """Output and importance after it."""
    return [function(*call.arguments, *call.tiers, **call.rotations), *(x for x in call.tiers[:2])]


def assert_close_to_float64(case: Case, call: Call, instructions: int = native.INSTRUCTION_SET) -> None:
    """No further from the reference in float64 than the reference in the call's own dtype, times a small constant, or than integers."""
    clean = without_garbage(call)
    own = run(attend_on(instructions), call.copy())
    exact = run(reference, clean.copy(torch.float64))
    plain = run(reference, clean.copy())
    assert own[0].dtype == case.dtype and own[0].shape == exact[0].shape
    for got, wanted, rounded in zip(own, exact, plain, strict=True):
        assert not got.isnan().any()
        error = (got.double() - wanted.double()).abs().max() if got.numel() else torch.zeros(())
        allowed = (rounded.double() - wanted.double()).abs().max() if got.numel() else torch.zeros(())
        largest = wanted.abs().max() if got.numel() else torch.zeros(())
        assert error <= 4 * allowed + 4 * max(torch.finfo(got.dtype).eps, eps_of(case.dtype, instructions)) * largest


@pytest.fixture(autouse=True)
def poisoned_scratch(poisoned):
    """New tensors start as NaN, and the operation's scratch memory holds what a call on NaN left there."""
    query, *others = build(Case(batch=4, heads=8, text=2000, bands=((64, 0, 0, 0),) * 4)).arguments
    assert attend(torch.full_like(query, float("nan")), *others).isnan().all()


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_attend_is_as_close_to_float64_as_the_reference(instructions):
    @settings(max_examples=120, deadline=None)
    @given(cases())
    @example(Case(text=0, tail=0))
    @example(Case(vision=65, text=64, tiers=True, partial=0, mask="bool"))
    @example(Case(vision=300, tiers=True, bands=((0, 0, 32, 0),) * 4, partial=16, batch=3))
    @example(Case(heads=4, head_dim=72, value_dim=80, bands=(None, (0, 0, 0, 64), (16, 0, 0, 0), None)))
    def check(case: Case) -> None:
        assert_close_to_float64(case, build(case), instructions)

    check()


LENGTHS = (0, 1, 63, 64, 65)


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("block", (0, 16, 64))
@pytest.mark.parametrize("shift", range(len(LENGTHS)))
def test_lengths_of_three_packed_segments_around_a_block(shift, block, instructions):
    coarse, vision, text = (LENGTHS[(shift + i) % len(LENGTHS)] for i in range(3))
    batch, heads, groups = ((1, 2, 1), (3, 4, 2))[shift % 2]
    case = Case(
        batch=batch, heads=heads, groups=groups, coarse=coarse, vision=vision, text=text, block=block, seed=shift
    )
    assert_close_to_float64(case, build(case), instructions)


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("width", (1100, 4096))
def test_wide_streams_run_in_several_tiles(width, instructions):
    heads = width // 4
    bands = ((16, 48, 400, 600), (64, 0, 0, 1000), (0, 600, 0, 0), (0, 0, 800, 0))
    case = Case(
        heads=heads,
        share=1,
        head_dim=4,
        value_dim=4,
        vision=70,
        text=130,
        bands=bands,
        tiers=True,
        partial=200,
        block=48,
    )
    assert_close_to_float64(case, build(case), instructions)


SHARING = {
    "no pairs": (1,),
    "all pairs": (99,),
    "fast and slow pairs": (99,) * 3 + (1,) * 5 + (2, 4, 8) + (99,) * 40,
    "slow pairs": (1, 1, 2, 4, 8, 16) + (99,) * 40,
    "fast pairs": (99,) * 10 + (1,) * 40,
}


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("scope", ("model", "sequence"))
@pytest.mark.parametrize(("share", "head_dim"), ((1, 72), (2, 128), (7, 64)), ids=str)
@pytest.mark.parametrize("sharing", SHARING.values(), ids=SHARING)
def test_blocks_that_share_the_rotations_of_some_pairs(sharing, share, head_dim, scope, instructions):
    bands = ((0, 0, 16, 35), (0, 0, 16, 0), (0, 0, 18, 64), (0, 0, 16, 0))
    case = Case(
        batch=2, heads=4, groups=2, share=share, head_dim=head_dim, value_dim=16, vision=300, text=700, bands=bands,
        scope=scope, block=32, sharing=sharing,
    )  # fmt: skip
    assert_close_to_float64(case, build(case), instructions)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_number_of_threads_changes_no_more_than_rounding(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close_to_float64(case := Case(vision=900, text=2100, tiers=True, block=32), build(case))
    finally:
        torch.set_num_threads(before)


def test_a_nan_that_is_read_shows():
    call = build(Case(empty=0.0))
    call.arguments[2][0, 1] = float("nan")
    out = attend(*call.arguments)
    assert out[:, 2:].isnan().all() and not out[:, :2].isnan().any()
    call = build(Case(empty=0.0))
    call.arguments[0][0, 1] = float("nan")
    assert attend(*call.arguments).isnan().any(-1).flatten().tolist() == [False, True, False, False]


def test_strides_do_not_matter():
    case = Case(batch=2, vision=40, tiers=True, mask="float", block=32)
    plain, strided = build(case), build(case)

    def spread(x):
        if isinstance(x, list):
            return [spread(y) for y in x]
        if not isinstance(x, Tensor) or x.dim() < 2:
            return x
        wide = x.new_zeros(*x.shape[:-2], x.shape[-2] * 2, x.shape[-1] * 3)
        wide[..., ::2, ::3] = x
        return wide[..., ::2, ::3]

    wanted = run(attend, plain)
    arguments = [spread(x) for x in strided.arguments]
    got = run(
        attend, Call(arguments, [*strided.tiers[:2], spread(strided.tiers[2]), *strided.tiers[3:]], strided.rotations)
    )
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_tensors_that_took_the_place_of_others_are_read():
    call, other = (without_garbage(build(replace(Case(), seed=seed))) for seed in (0, 1))
    before = attend(*call.arguments)
    call.arguments[5] = other.arguments[5]
    after = attend(*call.arguments)
    assert torch.equal(after, attend(*call.copy().arguments))
    assert not torch.equal(after, before)


def assert_reads_nothing_past_the_end(case: Case, instructions: int) -> None:
    """The same result where a page that may not be touched follows each tensor."""
    call, keep = build(case), []

    def placed(x):
        if isinstance(x, list):
            return [placed(y) for y in x]
        return guarded(x.contiguous(), keep) if isinstance(x, Tensor) and x.numel() else x

    rotations = {name: placed(x) for name, x in call.rotations.items()}
    wanted = run(attend_on(instructions), call.copy())
    got = run(attend_on(instructions), Call(placed(call.arguments), placed(call.tiers), rotations))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="needs mprotect")
@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_past_the_end_of_a_tensor_is_read(seed, instructions):
    sizes = ((64, 16), (72, 80), (3, 5), (33, 128), (80, 72), (16, 8))[seed]
    odd = ((3, 1, 3, 3), (0, 0, 1, 0), None, (0, 0, 0, 1), (1, 0, 0, 0), (0, 3, 0, 0))
    bands = tuple(odd[(seed + i) % 6] for i in range(4))
    case = Case(
        batch=2, head_dim=sizes[0], value_dim=sizes[1], vision=65, text=67, tail=3, empty=0.0, bands=bands, tiers=True,
        mask="float", seed=seed, scope=("model", "sequence")[seed % 2], dtype=(torch.float32, torch.bfloat16)[seed // 3],
        block=(0, 16, 64)[seed % 3],
    )  # fmt: skip
    assert_reads_nothing_past_the_end(case, instructions)


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="needs mprotect")
@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("scope", ["model", "sequence"])
def test_nothing_past_the_end_of_a_transposed_decoder_is_read(instructions, scope):
    bands = ((0, 0, 0, 5), (0, 0, 16, 0), (0, 0, 3, 0), (0, 0, 16, 0))
    case = Case(heads=1, head_dim=32, vision=65, text=300, bands=bands, empty=0.0, block=16, scope=scope)
    assert_reads_nothing_past_the_end(case, instructions)


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
@pytest.mark.parametrize("head_dim", [16, 32, 72])
def test_a_decoder_in_16_bits_is_transposed_as_one_in_float32(head_dim, instructions):
    bands = ((0, 0, 0, 5), (0, 0, 16, 0), (2, 0, 3, 0), (0, 0, 16, 0))
    for batch, heads, groups in ((1, 1, 1), (2, 4, 2)):
        case = Case(
            batch=batch, heads=heads, groups=groups, share=4, head_dim=head_dim, vision=65, text=300, bands=bands,
            block=16, scope="sequence",
        )  # fmt: skip
        assert_close_to_float64(case, build(case), instructions)


@pytest.mark.parametrize("instructions", SETS, ids=lambda i: native.INSTRUCTION_SETS[i])
def test_a_weight_too_small_for_a_normal_number_is_zero(instructions):
    """Some processors take a hundred times as long for a number below the smallest normal one."""
    call = build(Case(vision=300, text=300, tiers=True, empty=0.0))
    call.arguments[0] *= 30
    for known in call.tiers[:2]:
        known.zero_()
    assert_close_to_float64(Case(vision=300, text=300, tiers=True, empty=0.0), call, instructions)
    exact = run(reference, without_garbage(call).copy(torch.float64))
    _, *found = run(attend_on(instructions), call.copy())
    tiny = torch.finfo(torch.float32).tiny
    assert any(((x > 0) & (x < tiny)).any() for x in exact[1:])
    assert not any(((x > 0) & (x < tiny)).any() for x in found)


@pytest.mark.parametrize("function", (attend, reference), ids=("cpu", "reference"))
@pytest.mark.parametrize(("number", "name"), enumerate(("vision", "text")))
def test_importance_of_other_slots_is_refused(number, name, function):
    call = build(Case(vision=65, text=67, tiers=True))
    known = call.tiers[number]
    call.tiers[number] = known[:, :-1].contiguous()
    with pytest.raises(ValueError, match=rf"{name}_importance: shape \(1, {known.shape[1] - 1}\) must be \(1, "):
        function(*call.arguments, *call.tiers, **call.rotations)
