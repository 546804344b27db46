"""`apack::attend` on CPUs as the dispatcher calls it: what Python's way to the compiled operation gives, and clear errors."""

import pytest
import torch
from hypothesis import example, given, settings
from random_calls import REFUSED, Call, Case, build, cases, without_garbage
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.attend import cpu

pytestmark = pytest.mark.skipif(native.COMPILED is None, reason=f"the compiled operations are {native.STATUS}")

ATTEND = torch.ops.apack.attend.default
MASK, BIAS, DENSE, CODES, BASES, BANDS, POSITIONS, CURSOR, SCALE = range(3, 12)


def assert_as_called_from_python(call: Call) -> None:
    """The same bits both ways."""
    wanted = cpu.attend(*call.arguments, **call.turns)
    found = ATTEND(*call.arguments, **call.turns)
    assert found.dtype == wanted.dtype and found.stride() == wanted.stride()
    assert torch.equal(found, wanted)


@settings(max_examples=80, deadline=None)
@given(cases())
@example(Case(coarse=70, vision=65, text=64, block=32, batch=3))
@example(Case(vision=None, text=130, block=32, batch=3))
@example(Case(bands=(None, (0, 0, 0, 64), (16, 0, 0, 0), None), vision=5, mask="float"))
@example(Case(dtype=torch.bfloat16, scope="sequence", mask="bool", batch=2, new=3))
@example(Case(text=0, tail=0, grouped=True))
def test_the_dispatcher_gets_what_python_gets(case: Case):
    call = build(case)
    assert_as_called_from_python(Call(call.arguments, [], call.turns))


def strided(x: Tensor) -> Tensor:
    """The same values with a gap after each."""
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("unusual", ("codes", "turns", "half mask", "double", "scale", "values with gaps", "bias"))
def test_what_a_cache_does_not_have_is_served_too(unusual):
    mask = "float" if unusual == "half mask" else "none"
    call = without_garbage(build(Case(batch=2, block=16, mask=mask, bias=unusual == "bias")))
    if unusual == "codes":
        call.arguments[CODES] = [strided(x) for x in call.arguments[CODES]]
    if unusual == "turns":
        call.turns["turns"] = [x.double() for x in call.turns["turns"]]
    if unusual == "half mask":
        call.arguments[MASK] = call.arguments[MASK].half()
    if unusual == "double":
        call.arguments[:3] = [x.double() for x in call.arguments[:3]]
    if unusual == "scale":
        call.arguments[SCALE] = 0.3
    if unusual == "values with gaps":
        call.arguments[2] = strided(call.arguments[2])
    assert_as_called_from_python(call)


@pytest.mark.parametrize(
    ("at", "entries", "message"),
    (
        (DENSE, 3, "dense: 3 tensors must be 4"),
        (CODES, 7, "codes: 7 entries must be 4 for each of 2 packed segments"),
        (BASES, 11, "bases: 11 entries must be 6 for each of 2 packed segments"),
        (BANDS, 15, "bands: 15 entries must be 8 for each of 2 packed segments"),
        (POSITIONS, 1, "positions: 1 tensors must be 2 to 4"),
    ),
)
def test_lists_of_other_lengths_are_named(at, entries, message):
    call = build(Case())
    call.arguments[at] = call.arguments[at][:entries]
    with pytest.raises(REFUSED, match=message):
        ATTEND(*call.arguments)


def test_turns_of_another_number_of_segments_are_named():
    call = build(Case(block=16))
    with pytest.raises(REFUSED, match="turns: 1 entries must be one for each of 2 packed segments, or none"):
        ATTEND(*call.arguments, turns=call.turns["turns"][:1], block=16)


@pytest.mark.parametrize("how", ("served", "handed on", "refused"))
def test_a_call_keeps_none_of_its_tensors(how):
    call = build(Case(block=16, mask="bool", bias=how == "handed on"))
    if how == "refused":
        call.arguments[BANDS] = []
    held = [
        call.arguments[0],
        call.arguments[MASK],
        *call.arguments[DENSE],
        *call.arguments[BASES],
        *call.turns["turns"],
    ]

    def uses() -> list[int]:
        return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in held]

    before = uses()
    for _ in range(3):
        try:
            ATTEND(*call.arguments, **call.turns)
        except REFUSED:
            assert how == "refused"
    assert uses() == before
