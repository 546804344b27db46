"""Which token goes to which slot."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apack_compile.cache.token_index import MAX_CROP, Chunk, assign, gather_tokens, positions_of
from apack_compile.models.modality import compact


@st.composite
def chunks(draw) -> Chunk:
    """Chunks with any mix of vision, text and padding, per row."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(0, 25))
    rows = st.lists(st.sampled_from("vtp"), min_size=n, max_size=n)
    kinds = [draw(rows) for _ in range(batch)]
    if draw(st.booleans()):
        run = draw(st.integers(0, n))
        kinds = [row[: n - run] + ["t"] * run for row in kinds]
    flags = [
        torch.tensor([[kind == k for kind in row] for row in kinds], dtype=torch.bool).reshape(batch, n) for k in "vp"
    ]
    return Chunk(*flags, draw(st.integers(0, 100)))


@settings(max_examples=60, deadline=None)
@given(chunks(), st.sampled_from((0, 1, 4)), st.sampled_from((0, 1, 8, 40)))
def test_every_real_token_goes_to_exactly_one_place_and_padding_to_none(chunk, first_tokens, tail_slots):
    assignment = assign(chunk, first_tokens, tail_slots)
    batch, n = chunk.vision.shape
    assert assignment.tail <= min(tail_slots, n)
    for row in range(batch):
        real = (~chunk.padding[row]).nonzero().flatten().tolist()
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
@example(Chunk(torch.zeros(2, 50, dtype=torch.bool), torch.arange(50) < torch.tensor([[0], [3]]), 0), 6)
def test_the_newest_text_has_the_same_slots_in_every_row(chunk, tail_slots):
    assignment = assign(chunk, 0, tail_slots)
    batch, n = chunk.vision.shape
    text = (~chunk.vision & ~chunk.padding).all(0).tolist()
    run = next((i for i, is_text in enumerate(reversed(text)) if not is_text), len(text))
    assert assignment.tail == min(run, tail_slots)
    assert assignment.recent == min(run, max(tail_slots, MAX_CROP))
    packed = assignment.recent - assignment.tail
    newest = torch.arange(n - assignment.recent, n - assignment.tail)
    assert torch.equal(assignment.text[:, assignment.text.shape[1] - packed :], newest.expand(batch, -1))


def test_first_tokens_can_differ_by_row():
    none = torch.zeros(2, 6, dtype=torch.bool)
    assignment = assign(Chunk(none, none, 0), torch.tensor([[1], [3]]), 0)
    assert assignment.first.tolist() == [[0, -1, -1], [0, 1, 2]]
    assert [[i for i in row if i >= 0] for row in assignment.text.tolist()] == [[1, 2, 3, 4, 5], [3, 4, 5]]


def test_empty_slots_gather_zeros_and_have_no_position():
    index = compact(torch.tensor([[True, False, True], [False, False, True]]))
    assert index.tolist() == [[0, 2], [2, -1]]
    x = torch.arange(1.0, 13.0).reshape(2, 1, 3, 2)
    assert gather_tokens(x, index).tolist() == [[[[1, 2], [5, 6]]], [[[11, 12], [0, 0]]]]
    positions = positions_of(index, 10)
    assert positions.dtype == torch.int32 and positions.tolist() == [[10, 12], [12, -1]]
