"""Which token goes to which slot."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apack_compile.cache.token_index import MAX_CROP, Chunk, Taken, assign, compact, positions_of


@st.composite
def chunks(draw) -> Chunk:
    """Chunks with any mix of vision, text and padding, per row."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(0, 25))
    rows = st.lists(st.sampled_from("vtp"), min_size=n, max_size=n)
    kinds = [draw(rows) for _ in range(batch)]
    if draw(st.booleans()):
        run = draw(st.integers(0, n))
        kinds = [row[: n - run] + ["t"] * run for row in kinds]
    flags = [np.array([[kind == k for kind in row] for row in kinds], dtype=bool).reshape(batch, n) for k in "vp"]
    return Chunk(*flags, draw(st.integers(0, 100)))


@settings(max_examples=60, deadline=None)
@given(chunks(), st.sampled_from((0, 1, 4)), st.sampled_from((0, 1, 8, 40)))
def test_every_real_token_goes_to_exactly_one_place_and_padding_to_none(chunk, first_tokens, tail_slots):
    assignment = assign(chunk, first_tokens, tail_slots)
    batch, n = chunk.vision.shape
    assert assignment.tail <= min(tail_slots, n)
    for row in range(batch):
        real = (~chunk.padding[row]).nonzero()[0].tolist()
        vision = chunk.vision[row] & ~chunk.padding[row]
        first, seen, text = (
            [i for i in index[row].tolist() if i >= 0]
            for index in (assignment.first, assignment.vision, assignment.text)
        )
        tail = list(range(n - assignment.tail, n))
        assert sorted([*first, *seen, *text, *tail]) == real
        assert first == real[:first_tokens]
        assert all(vision[i] for i in seen) and not any(vision[i] for i in text + tail)
        assert seen == sorted(seen) and text == sorted(text)


@settings(max_examples=40, deadline=None)
@given(chunks(), st.sampled_from((0, 1, 6)))
@example(Chunk(np.zeros((2, 50), bool), np.arange(50) < np.array([[0], [3]]), 0), 6)
def test_the_newest_text_has_the_same_slots_in_every_row(chunk, tail_slots):
    assignment = assign(chunk, 0, tail_slots)
    batch, n = chunk.vision.shape
    text = (~chunk.vision & ~chunk.padding).all(0).tolist()
    run = next((i for i, is_text in enumerate(reversed(text)) if not is_text), len(text))
    assert assignment.tail == min(run, tail_slots)
    assert assignment.recent == min(run, max(tail_slots, MAX_CROP))
    packed = assignment.recent - assignment.tail
    newest = np.arange(n - assignment.recent, n - assignment.tail)
    assert np.array_equal(assignment.text[:, assignment.text.shape[1] - packed :], [newest] * batch)


def test_first_tokens_can_differ_by_row():
    none = np.zeros((2, 6), bool)
    assignment = assign(Chunk(none, none, 0), np.array([[1], [3]]), 0)
    assert assignment.first.tolist() == [[0, -1, -1], [0, 1, 2]]
    assert [[i for i in row if i >= 0] for row in assignment.text.tolist()] == [[1, 2, 3, 4, 5], [3, 4, 5]]


def test_empty_slots_gather_zeros_and_have_no_position():
    index = compact(np.array([[True, False, True], [False, False, True]]))
    assert index.tolist() == [[0, 2], [2, -1]]
    x = torch.arange(1.0, 13.0).reshape(2, 1, 3, 2)
    taken = Taken.at(index, x.device)
    assert taken.of(x).tolist() == [[[[1, 2], [5, 6]]], [[[11, 12], [0, 0]]]] and taken.tokens == 3
    positions = positions_of(index, 10)
    assert positions.dtype == np.int32 and positions.tolist() == [[10, 12], [12, -1]]


@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_tokens_are_taken_as_their_indices_say(batch, n, data):
    row = st.lists(st.integers(-1, n - 1), min_size=3, max_size=3)
    rows = data.draw(st.lists(row, min_size=batch, max_size=batch))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, n - 1))
        rows = [list(range(start, n))] * batch
    x = torch.arange(1.0, 1 + batch * 2 * n * 2).view(batch, 2, n, 2)
    taken = Taken.at(np.array(rows), x.device)
    expected = [
        [[x[b, h, i].tolist() if i >= 0 else [0, 0] for i in row] for h in range(2)] for b, row in enumerate(rows)
    ]
    for found in (taken.of(x), taken.copied(x)):
        assert found.tolist() == expected
    assert taken.tokens == sum(i >= 0 for row in rows for i in row) and taken.slots == len(rows[0])
    follow = (
        all(row == list(range(row[0], row[0] + len(row))) and row[0] >= 0 for row in rows)
        and len(set(map(tuple, rows))) == 1
    )
    assert (taken.start is not None) == follow
    assert taken.copied(x).data_ptr() != x.data_ptr()
