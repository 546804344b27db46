"""pack in Triton: what the reference says, in the interpreter, or compiled with --device=cuda."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import packing_on_cuda
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

from apack_compile.kernels import cuda
from apack_compile.kernels.format import Bands
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.pack.reference import pack
from apack_compile.kernels.state import TEXT, layout_words
from apack_compile.plan.basis import fit, moments

pytestmark = pytest.mark.usefixtures("poisoned")
BANDS = [Bands((3, 5, 0, 9)), Bands((0, 0, 7, 4)), Bands((0, 12, 0, 0)), Bands((5, 0, 0, 0))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def given_to_pack(data: Any, device: torch.device) -> tuple:
    """Arguments of pack, drawn."""
    draw = data.draw
    batch, groups, per, tokens = (draw(st.integers(1, most)) for most in (2, 2, 2, 20))
    dims = draw(st.sampled_from([(8, 8), (10, 6), (6, 12)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    # only bases that all rows share are watched
    every, states, bases, bands = draw(st.sampled_from([0, 1, 3])), [], [], []
    for dim in dims:
        x = torch.randn(batch, groups * per, tokens, dim, generator=generator) + 1
        own = torch.randn(1 if every else batch, groups * per, 60, dim, generator=generator)
        chosen = draw(st.sampled_from(BANDS)).at_most(per * dim)
        basis = fit(moments(to_groups(own, groups))).basis(
            chosen, draw(st.sampled_from([torch.float32, torch.float16]))
        )
        states.append(x.to(dtype))
        bases += list(basis)
        bands.append(chosen)
    used, block = draw(st.integers(0, 20)), draw(st.sampled_from([0, 4, 16]))
    slots = used + tokens + draw(st.integers(0, 3))
    if block:
        turns = torch.randn(batch, slots // block + 2, 2, draw(st.integers(1, dims[0] // 2)), generator=generator)
        bases.append(turns / turns.norm(dim=2, keepdim=True))
    scaled = [draw(st.booleans()), draw(st.booleans())]
    real = torch.rand(batch, tokens, generator=generator) < 0.8 if draw(st.booleans()) else None
    layout = layout_words(block, 0, [(TEXT, (bands[0], bands[1]))])
    there = [x.to(device) for x in (*states, *bases)]
    real = None if real is None else real.to(device)
    return *there[:2], there[2:], layout, groups, scaled, used, slots, every, real


@settings(max_examples=6)
@given(st.data())
def test_tokens_are_packed_and_their_loss_is_found_as_the_reference_does(device, data):
    arguments = given_to_pack(data, device)
    used, tokens = arguments[6], arguments[0].shape[2]
    *got, lost = cuda.pack(*arguments)
    *expected, wanted = pack(*arguments)
    for found, known in zip(got, expected, strict=True):
        assert found.shape == known.shape and found.dtype == known.dtype
        if found.dim() > 1:
            # a coefficient near a tie may be rounded the other way
            differ = found[:, :, used : used + tokens] != known[:, :, used : used + tokens]
            assert differ.float().mean() <= 0.02
            assert not found[:, :, used + tokens :].any(), "free slots are zero"
    torch.testing.assert_close(lost, wanted, atol=2e-3, rtol=1e-2)


def test_a_segment_takes_few_operations_and_launches_on_cuda():
    bands, states = Bands((0, 8, 8, 0)), torch.randn(1, 2, 300, 8)
    basis: list[Tensor] = [*fit(moments(to_groups(states, 1))).basis(bands)]
    layout = layout_words(0, 0, [(TEXT, (bands, bands))])
    counts = packing_on_cuda((states, states, [*basis, *basis], layout, 1, [True, True], 0, 320, 1))
    launched = {name for name in counts.operations if name.startswith("launch")}
    assert launched == {f"launch of {name}" for name in ("project", "write", "lost", "share")}
    assert counts.total <= 11, counts.operations
