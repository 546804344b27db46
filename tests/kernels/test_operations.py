"""append, unpack and attend on random states, against a dense model of the same tokens in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_calls import build as build_call
from random_calls import cases, without_garbage
from state_lists import append_lists, attend_with, state_of, unpack_with
from states import APPEND, ATTEND, UNPACK, Shape, allowed_by, append, attention, build, filled, shapes

from apack_compile import kernels  # noqa: F401
from apack_compile.kernels import native
from apack_compile.kernels.attend import reference as attend_reference
from apack_compile.kernels.state import Layout, PackedState
from apack_compile.kernels.unpack import reference as unpack_reference

attend, unpack = attend_with(attend_reference.attend), unpack_with(unpack_reference.unpack)


@settings(max_examples=50, deadline=None)
@given(shapes(), st.integers(0, 4))
def test_unpack_returns_every_token_where_it_was(shape, more):
    state = filled(shape)
    tokens = state.held + more
    unpacked = UNPACK(state.key, state.value, *state.stored, tokens, **state.rotated)
    for got, expected, new in zip(unpacked, state.expected, (state.key, state.value), strict=True):
        n = new.shape[2]
        assert got.shape == (shape.batch, shape.heads, tokens, shape.head_dim)
        assert torch.equal(got[:, :, state.held - n : state.held], new)
        assert not got[:, :, state.held :].any()
        assert not got.masked_fill(torch.nn.functional.pad(state.real, (0, more))[:, None, :, None], 0).any()
        packed = int(state.cursor[1])
        assert torch.equal(got[:, :, packed : state.held], expected[:, :, packed:])
        # a float16 band near a tie may round by one unit when a token is encoded with others
        torch.testing.assert_close(got[:, :, : state.held - n], expected[:, :, : state.held - n], atol=3e-3, rtol=2e-3)
        if shape.scope == "as is" and not shape.block:
            assert torch.equal(got[:, :, : state.held], expected)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.data())
def test_attend_is_attention_over_the_unpacked_tokens(shape, data):
    state = filled(shape)
    n, tokens = state.key.shape[2], state.held + data.draw(st.integers(0, 3))
    share = data.draw(st.sampled_from((1, 2, 3)))
    grouped = data.draw(st.booleans())
    heads, rows = (shape.heads, share * n) if grouped else (shape.heads * share, n)
    query = torch.randn(shape.batch, heads, rows, shape.head_dim, generator=state.generator, dtype=torch.float64)
    key, value = UNPACK(state.key, state.value, *state.stored, tokens, **state.rotated)
    mask, added = None, torch.zeros((), dtype=torch.float64)
    allowed = allowed_by(state, tokens, rows)
    kind = data.draw(st.sampled_from(("none", "bool", "float", "infinite")))
    if kind != "none":
        allowed = allowed_by(state, tokens, -1)[:, :, :1]
        extent = [data.draw(st.sampled_from((1, full))) for full in (shape.batch, heads, rows)]
        keep = torch.rand(*extent, tokens, generator=state.generator) < 0.6
        if kind == "bool":
            mask, allowed = keep, allowed & keep
        else:
            mask = torch.randn(*extent, tokens, generator=state.generator, dtype=torch.float64)
            mask = mask.masked_fill(~keep, float("-inf")) if kind == "infinite" else mask
            added = added + mask
    scale = data.draw(st.sampled_from((None, 0.3)))
    out = ATTEND(query, state.key, state.value, mask, *state.stored, scale, **state.rotated)
    torch.testing.assert_close(out, attention(query, key, value, allowed, added, scale), atol=1e-10, rtol=1e-10)


@settings(max_examples=60, deadline=None)
@given(cases(st.sampled_from((0, 1, 63, 64, 65))))
def test_the_reference_attends_to_what_it_unpacks_whatever_the_lengths_of_segments(case):
    case = replace(case, tiers=False, dtype=torch.float32)
    query, key, value, mask, *state, _ = (call := without_garbage(build_call(case)).copy(torch.float64)).arguments
    key, value, cursor, positions = key.double(), value.double(), state[5], state[4]
    held, new = int(cursor[0]), key.shape[2]
    unpacked = unpack(key, value, *state, held, **call.rotations)
    allowed = torch.zeros(case.batch, held, dtype=torch.bool)
    ring = int(cursor[1]) + torch.arange(held - int(cursor[1]))
    allowed[:, ring] = True
    for where in positions:
        for row, slots in zip(allowed, where.long(), strict=True):
            row[slots[(slots >= 0) & (slots < int(cursor[1]))]] = True
    allowed, added = allowed[:, None, None].expand(-1, 1, query.shape[2], -1), torch.zeros((), dtype=torch.float64)
    if mask is None and query.shape[2] == new:
        allowed = allowed & (torch.arange(held) <= held - new + torch.arange(new)[:, None])
    if mask is not None:
        mask = mask[..., :held]
        allowed, added = (allowed & mask, added) if mask.dtype == torch.bool else (allowed, added + mask.double())
    out = attend(*call.arguments, **call.rotations)
    torch.testing.assert_close(out, attention(query, *unpacked, allowed, added, None), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("scope", ("model", "sequence", "as is"))
@pytest.mark.parametrize(("groups", "block"), ((1, 0), (2, 0), (1, 16)))
def test_attend_is_no_further_from_float64_than_attention_in_the_same_dtype(dtype, scope, groups, block):
    worst_own, worst_plain, largest = 0.0, 0.0, 0.0
    for seed in range(4):
        bands = ((16, 0, 16, 0), (0, 0, 32, 0), (0, 16, 0, 16), (0, 0, 16, 16))
        if groups == 2:
            bands = tuple(tuple(count // 2 for count in b) for b in bands)
        shape = Shape(
            head_dim=20, groups=groups, laid_out=111, bands=bands, scope=scope, dtype=dtype, seed=seed, block=block
        )
        state = filled(shape)
        query = torch.randn(2, 6, 1, 20, generator=state.generator).to(dtype)
        exact = UNPACK(state.key.double(), state.value.double(), *state.stored, state.held, **state.rotated)
        rounded = UNPACK(state.key, state.value, *state.stored, state.held, **state.rotated)
        allowed = allowed_by(state, state.held, 1)
        reference = attention(query.double(), *exact, allowed, 0.0, None)
        plain = attention(query, *rounded, allowed, 0.0, None)
        own = ATTEND(query, state.key, state.value, None, *state.stored, None, **state.rotated)
        assert own.dtype == dtype
        worst_own = max(worst_own, float((own.double() - reference).abs().max()))
        worst_plain = max(worst_plain, float((plain.double() - reference).abs().max()))
        largest = max(largest, float(reference.abs().max()))
    coarser = torch.float16 if native.has_integers(native.INSTRUCTION_SET) else dtype
    assert worst_own <= 2 * worst_plain + max(torch.finfo(x).eps for x in (dtype, coarser)) * largest


def test_autocast_casts_nothing_inside_of_an_operation():
    # relative keys that are kept as they are get the reference, whose products autocast would cast
    state = filled(Shape(head_dim=20, laid_out=111, scope="as is", dtype=torch.float32, block=16))
    query = torch.randn(2, 6, 1, 20, generator=state.generator)
    arguments = query, state.key, state.value, None, *state.stored, None
    outside = ATTEND(*arguments, **state.rotated)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ATTEND(*arguments, **state.rotated), outside)


def test_a_row_that_may_attend_nothing_gives_zeros():
    shape = Shape(chunks=(2,))
    state = filled(shape)
    query = torch.randn(2, 4, 2, 5, dtype=torch.float64)
    mask = torch.ones(2, 1, 2, state.held, dtype=torch.bool)
    mask[1, :, 0] = False
    out = ATTEND(query, state.key, state.value, mask, *state.stored, None, **state.rotated)
    assert not out[1, :, 0].any()
    assert out[1, :, 1].all() and out[0].all()


@settings(max_examples=30, deadline=None)
@given(shapes(), st.sampled_from((float("nan"), float("inf"))))
@example(Shape(tail=8, chunks=(2,), batch=3, seed=1), float("nan"))
@example(Shape(laid_out=5, chunks=(2,), batch=8, seed=1), float("nan"))
def test_what_lies_in_unused_slots_never_shows(shape, poison):
    bands = tuple((0, b[1], b[2] + b[0], b[3]) for b in shape.bands)
    state = filled(replace(shape, bands=bands))
    n = state.key.shape[2]
    query = torch.randn(shape.batch, shape.heads, n, shape.head_dim, generator=state.generator, dtype=torch.float64)
    before = ATTEND(query, state.key, state.value, None, *state.stored, None, **state.rotated)
    clean = UNPACK(state.key, state.value, *state.stored, state.held, **state.rotated)
    empty = state.positions[0] < 0
    ring = torch.full((shape.tail,), True)
    ring[torch.arange(int(state.cursor[1]), state.held) % max(shape.tail, 1)] = False
    for i in range(2):
        state.dense[i].masked_fill_(empty[:, None, :, None], poison)
        state.dense[2 + i].masked_fill_(ring[:, None], poison)
    for i in range(0, len(state.codes), 2):
        if state.codes[i].dtype == torch.uint8:
            where = state.positions[1 + i // 4]
            unused = (where < 0) | (where >= state.cursor[1])
            state.codes[i].masked_fill_(unused[:, None, :, None], 0xFF)
    assert torch.equal(ATTEND(query, state.key, state.value, None, *state.stored, None, **state.rotated), before)
    for got, expected in zip(
        UNPACK(state.key, state.value, *state.stored, state.held, **state.rotated), clean, strict=True
    ):
        assert torch.equal(got, expected)


@settings(max_examples=30, deadline=None)
@given(shapes())
def test_appending_at_once_equals_appending_one_by_one(shape):
    total = sum(shape.chunks)
    at_once, one_by_one = build(shape), build(shape)
    size = (shape.batch, shape.heads, total, shape.head_dim)
    key, value = (torch.randn(size, generator=at_once.generator, dtype=torch.float64) for _ in range(2))
    APPEND(key, value, *at_once.appended, **at_once.rotated_text)
    for i in range(total):
        APPEND(key[:, :, i : i + 1], value[:, :, i : i + 1], *one_by_one.appended, **one_by_one.rotated_text)
    assert torch.equal(at_once.cursor, one_by_one.cursor)
    none = key[:, :, :0]
    both = [UNPACK(none, none, *state.stored, at_once.held) for state in (at_once, one_by_one)]
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, atol=3e-3, rtol=2e-3)


@pytest.mark.parametrize("tail", (0, 4))
def test_appending_past_the_last_free_slot_raises_and_changes_nothing(tail):
    shape = Shape(spare=7, tail=tail, chunks=(5 + tail,))
    state = filled(shape)
    before = [t.clone() for t in (*state.dense, *state.codes, state.cursor)]
    token = torch.ones(2, 2, 3, 5, dtype=torch.float64)
    with pytest.raises(IndexError, match="no free slot"):
        APPEND(token, token, *state.appended)
    for tensor, saved in zip((*state.dense, *state.codes, state.cursor), before, strict=True):
        assert torch.equal(tensor, saved)
    APPEND(token[:, :, :2], token[:, :, :2], *state.appended)
    assert state.held == shape.laid_out + 7 + tail


def test_append_leaves_tokens_that_were_packed_before_alone():
    shape = Shape(chunks=(9,))
    state = filled(shape)
    packed = int(state.cursor[1]) - int(state.cursor[2])
    saved = [codes[:, :, :packed].clone() for codes in state.codes[-4:]]
    append(state, shape, 11)
    for codes, before in zip(state.codes[-4:], saved, strict=True):
        assert torch.equal(codes[:, :, :packed], before)


OPCHECK_SHAPES = (
    Shape(dtype=torch.float32),
    Shape(batch=1, heads=1, head_dim=7, tail=0, chunks=(1,), bands=((3, 0, 4, 0),) * 4, dtype=torch.bfloat16),
    Shape(batch=3, heads=4, groups=4, head_dim=6, bands=((0, 2, 3, 1),) * 4, chunks=(2, 5), dtype=torch.float64),
    Shape(chunks=(9, 1), block=4, dtype=torch.bfloat16),
    Shape(scope="as is", chunks=(1,), tail=0, dtype=torch.float32),
    Shape(shares=(0.3, 0.4), bands=((0, 2, 3, 1),) * 6, chunks=(9, 1), block=4, dtype=torch.float32),
    Shape(scope="sequence", token_scale=False, chunks=(3,), dtype=torch.bfloat16),
)


@pytest.mark.parametrize("shape", OPCHECK_SHAPES, ids=range(len(OPCHECK_SHAPES)))
def test_append_declares_what_it_does(shape):
    state = filled(shape)
    lists = append_lists(*state.appended, **state.rotated_text)
    torch.library.opcheck(torch.ops.apack.append.default, (state.key, state.value, *lists))


@pytest.mark.parametrize("shape", OPCHECK_SHAPES, ids=range(len(OPCHECK_SHAPES)))
def test_unpack_declares_what_it_does(shape):
    state = filled(shape)
    lists = state_of(*state.stored, **state.rotated).flatten()
    torch.library.opcheck(torch.ops.apack.unpack.default, (state.key, state.value, *lists, state.held + 3))


@pytest.mark.parametrize("shape", OPCHECK_SHAPES, ids=range(len(OPCHECK_SHAPES)))
def test_attend_declares_what_it_does(shape):
    state = filled(shape)
    n = state.key.shape[2]
    query = torch.randn(shape.batch, 2 * shape.heads, n, shape.head_dim).to(shape.dtype)
    mask = torch.rand(1, 1, n, state.held) < 0.7
    lists = state_of(*state.stored, **state.rotated).flatten()
    attend = torch.ops.apack.attend.default
    torch.library.opcheck(attend, (query, state.key, state.value, None, *lists, None))
    torch.library.opcheck(attend, (query, state.key, state.value, mask, *lists, 0.4))


WRONG_LISTS = {
    "a tensor less": (
        lambda state, layout: (state[:-1], layout),
        "state: 27 tensors must be 28: 6, and 11 for each of 2 packed segments",
    ),
    "no tensors": (lambda state, layout: ([], layout), "state: "),
    "no rotations": (
        lambda state, layout: (state, [layout[0], 16, *layout[2:]]),
        "state: 28 tensors must be 30: 6, and 12",
    ),
    "an integer less": (
        lambda state, layout: (state, layout[:-1]),
        "layout: 20 integers must be one of .12, 21, 30, 39, 48., for one to 5",
    ),
    "no segment": (lambda state, layout: (state[:6], layout[:3]), "layout: 3 integers must be one of"),
    "text before vision": (
        lambda state, layout: (state, [*layout[:3], 2, *layout[4:12], 1, *layout[13:]]),
        "layout: kinds .2, 1. must be",
    ),
    "an unknown kind": (
        lambda state, layout: (state, [*layout[:3], 7, *layout[4:]]),
        "layout: kinds .7, 2. must be some of",
    ),
    "another version": (
        lambda state, layout: (state, [9, *layout[1:]]),
        "layout: version 9 must be 1, which this apack-compile reads",
    ),
    "no layout": (
        lambda state, layout: (state, []),
        "layout: missing: the program was saved by an apack-compile 0.1.0",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_LISTS.values(), ids=WRONG_LISTS)
@pytest.mark.parametrize("operation", ("attend", "unpack"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_lists_that_are_no_state_are_refused(dtype, operation, change, message):
    state = filled(Shape(dtype=dtype))
    lists = change(*state_of(*state.stored).flatten())
    with pytest.raises(ValueError, match=message):
        if operation == "unpack":
            torch.ops.apack.unpack(state.key, state.value, *lists, state.held)
        else:
            torch.ops.apack.attend(state.key, state.key, state.value, None, *lists, None)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_append_takes_the_lists_of_text_alone(dtype):
    state = filled(Shape(dtype=dtype, block=4))
    stores, bases, layout = append_lists(*state.appended, **state.rotated_text)
    before = [x.clone() for x in stores]
    two = state_of(*state.stored, **state.rotated).layout.flatten()
    for wrong, message in (
        ((stores[:-1], bases, layout), "stores: 6 tensors must be 7"),
        ((stores, bases[:-1], layout), "bases: 6 tensors must be 7"),
        ((stores, bases, two), "layout: kinds .1, 2. must be .2,., text alone"),
        ((stores, bases, []), "layout: missing"),
        ((stores, bases, [2, *layout[1:]]), "layout: version 2 must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.apack.append(state.key, state.value, *wrong)
    assert all(map(torch.equal, stores, before))


@pytest.mark.parametrize("shape", OPCHECK_SHAPES, ids=range(len(OPCHECK_SHAPES)))
def test_a_state_comes_back_from_its_lists(shape):
    state = filled(shape)
    made = state_of(*state.stored, **state.rotated, interleaved_pairs=2)
    lists = made.flatten()
    back = PackedState.parse(*lists)
    assert back.flatten() == lists and back.layout == made.layout == Layout.parse(lists[1])
    names = made.layout.tensor_names()
    by_name = PackedState.parse(names, lists[1])
    assert by_name.flatten()[0] == names
    assert by_name.text.value.basis.decoder == "text_value_decoder" and by_name.tail.key == "tail_key"
    assert (by_name.text.rotations == "text_rotations") == bool(shape.block)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_tiers_are_of_vision_and_text_only(dtype):
    state = filled(Shape(shares=(0.3, 0.4), bands=((0, 2, 3, 1),) * 6, dtype=dtype))
    none, tiers = torch.empty(2, 0), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="layout: packed segments coarse, vision, text must be vision and text"):
        torch.ops.apack.attend_tiers(
            state.key,
            state.key,
            state.value,
            None,
            *state_of(*state.stored).flatten(),
            None,
            none,
            none,
            tiers,
            0,
            [0.0] * 4,
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_no_rotations_and_an_empty_list_of_them_are_keys_as_they_come(dtype):
    state = filled(Shape(dtype=dtype))
    given = (state.key, state.value, *state.stored, state.held)
    for got, wanted in zip(UNPACK(*given, rotations=[]), UNPACK(*given), strict=True):
        assert torch.equal(got, wanted)
    query = (state.key, state.key, state.value, None, *state.stored, None)
    assert torch.equal(ATTEND(*query, rotations=[]), ATTEND(*query))
