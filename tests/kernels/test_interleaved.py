"""Keys whose interleaved pairs (2 i, 2 i + 1) rotate, held in halves: against the rotation of complex numbers, and dense attention."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_calls import Case, build, without_garbage
from state_lists import attend_with, unpack_with
from torch import Tensor

from apack_compile.kernels import native
from apack_compile.kernels.attend import cpu as attend_cpu
from apack_compile.kernels.attend import reference
from apack_compile.kernels.rotations import check_pairs, deinterleaved, interleaved, rotated
from apack_compile.kernels.unpack import cpu as unpack_cpu
from apack_compile.kernels.unpack import reference as unpack_specification

STATE = slice(4, 10)
attend_reference, unpack_reference = attend_with(reference.attend), unpack_with(unpack_specification.unpack)


@st.composite
def heads_of(draw) -> tuple[Tensor, int]:
    """Keys `[B, H, T, D]` in float64, and pairs of which there may be fewer than a head has room for."""
    size = draw(st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 21)))
    keys = torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).double()
    return keys, draw(st.integers(0, size[3] // 2))


@given(heads_of())
def test_halves_are_another_order_of_the_components_and_come_back(made):
    keys, pairs = made
    halves = deinterleaved(keys, pairs)
    assert torch.equal(interleaved(halves, pairs), keys)
    assert torch.equal(halves[..., 2 * pairs :], keys[..., 2 * pairs :])
    for i in range(pairs):
        assert torch.equal(halves[..., i], keys[..., 2 * i]) and torch.equal(
            halves[..., pairs + i], keys[..., 2 * i + 1]
        )


@given(heads_of(), st.booleans())
def test_rotated_in_halves_interleaved_pairs_rotate_as_complex_numbers_do(made, back):
    keys, pairs = made
    angles = torch.randn(keys.shape[2], pairs, dtype=torch.float64)
    rotations = torch.stack([angles.cos(), angles.sin()], dim=-2)
    got = interleaved(rotated(deinterleaved(keys, pairs), rotations, back=back), pairs)
    numbers = torch.view_as_complex(keys[..., : 2 * pairs].unflatten(-1, (pairs, 2)).contiguous())
    as_numbers = numbers * torch.polar(torch.ones_like(angles), -angles if back else angles)
    torch.testing.assert_close(got[..., : 2 * pairs], torch.view_as_real(as_numbers).flatten(-2))
    assert torch.equal(got[..., 2 * pairs :], keys[..., 2 * pairs :])


def implementations() -> dict:
    """`attend` and `unpack` of everything that serves a CPU, and Triton's kernels in its interpreter."""
    found = {"reference": (attend_reference, unpack_reference)}
    if native.COMPILED is not None:
        found["cpu"] = (attend_with(attend_cpu.attend), unpack_with(unpack_cpu.unpack))
    try:
        from apack_compile.kernels.attend.triton import attend as attend_triton
    except ImportError:
        return found
    return found | {"triton": (attend_with(attend_triton), unpack_reference)}


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("pairs", (6, 3), ids=("whole rotary part", "half of it"))
@pytest.mark.parametrize("block", (7, 64))
def test_attending_in_halves_is_dense_attention_over_what_unpack_gives(block, pairs, name):
    case = Case(
        batch=3, head_dim=20, value_dim=20, vision=65, text=65, tail=3, new=2, bands=((8, 0, 12, 16), (0, 8, 0, 16)) * 2,
        empty=0.1, block=block, seed=pairs,
    )  # fmt: skip
    call = without_garbage(build(case))
    # fewer pairs rotate than the case made angles for
    rotations = {"rotations": [x[..., :pairs].contiguous() for x in call.rotations["rotations"]], "block": block}
    attend, unpack = implementations()[name]
    query, key, value = call.arguments[:3]
    held = int(call.arguments[STATE][-1][0])
    halves = [deinterleaved(query, pairs), deinterleaved(key, pairs)]
    keys, values = unpack(halves[1], value, *call.arguments[STATE], held, **rotations, interleaved_pairs=pairs)
    assert torch.equal(keys[:, :, -2:], key), "the new keys are the model's"
    mask = torch.rand(3, 1, 2, held, generator=torch.Generator().manual_seed(pairs)) < 0.7

    exact = [x.double() for x in (halves[1], value)]
    keys, values = unpack_reference(*exact, *call.arguments[STATE], held, **rotations, interleaved_pairs=pairs)
    seen = keys.any(-1).any(1)[:, None, None] & mask
    scores = query.double() @ keys.repeat_interleave(case.share, 1).mT * case.head_dim**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    wanted = weights @ values.repeat_interleave(case.share, 1)
    rest = [mask, *call.arguments[STATE], None]
    got = attend(*halves, value, *rest, **rotations)
    in_16_bits = name == "triton" or (name != "reference" and native.has_integers(native.INSTRUCTION_SET))
    torch.testing.assert_close(got.double(), wanted, atol=2e-3 if in_16_bits else 1e-5, rtol=0)
    other = attend(query, key, value, *rest, **rotations)
    assert not torch.allclose(got, other, atol=0.05), "the order of components matters here"


@pytest.mark.parametrize("pairs", (-1, 11))
def test_more_pairs_than_a_key_has_are_refused(pairs):
    call = build(replace(Case(), head_dim=20))
    _, key, value, *_ = call.arguments
    tokens = int(call.arguments[STATE][-1][0])
    message = f"interleaved_pairs={pairs} must be from 0 to 10 for keys of head_dim 20"
    with pytest.raises(ValueError, match=message):
        check_pairs(pairs, 20)
    for _, unpack in implementations().values():
        with pytest.raises(ValueError, match=message):
            unpack(key, value, *call.arguments[STATE], tokens, interleaved_pairs=pairs)
