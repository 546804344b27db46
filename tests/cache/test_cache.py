"""The packed cache against a plain list of dense tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pair import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    PLANS,
    RANK,
    WIDTH,
    Pair,
    flags,
    new_cache,
    same_tokens,
    states_of,
    unpacked,
    walked_bytes,
)

from apack_compile.cache.layer import MAX_APPEND
from apack_compile.plan.budget import budget_plan
from apack_compile.plan.coarse_rule import NEWEST, scores_of


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(PLANS)), st.sampled_from((torch.float32, torch.bfloat16)))
def test_any_sequence_of_operations_keeps_every_token(data, plan, dtype):
    pair = Pair(plan, batch=data.draw(st.integers(1, 3)), dtype=dtype, seed=data.draw(st.integers(0, 10**6)))
    for _ in range(data.draw(st.integers(1, 7))):
        names = ("chunk", "append", "crop", "reorder", "repeat", "select", "reset")
        step = data.draw(st.sampled_from(names)) if pair.held else "chunk"
        if step == "chunk":
            count = data.draw(st.integers(1 if pair.held else 4, 70))
            pair.feed(count, *data.draw(flags(pair, count)))
        elif step == "append":
            for _ in range(data.draw(st.integers(1, 20))):
                pair.feed(1)
        elif step == "crop":
            loose = pair.held - pair.cache.groups.floor
            pair.cache.crop(-loose if (count := data.draw(st.integers(0, 30))) > loose else -count)
            left = pair.held - min(count, loose)
            pair.change(lambda x, n=left: x[:, :, :n], lambda x, n=left: x[:, :n])
        elif step == "reset":
            pair.cache.reset()
            pair.forget()
            assert int(pair.cache.get_seq_length()) == 0
            continue
        else:
            rows = torch.randint(0, pair.batch, (pair.batch,), generator=pair.generator)
            if step == "reorder":
                pair.cache.reorder_cache(rows)
            elif step == "select":
                rows = rows[: data.draw(st.integers(1, pair.batch))]
                pair.cache.batch_select_indices(rows)
            else:
                repeats = data.draw(st.integers(1, 2 if pair.batch < 4 else 1))
                pair.cache.batch_repeat_interleave(repeats)
                rows = torch.arange(pair.batch).repeat_interleave(repeats)
            pair.change(lambda x, rows=rows: x[rows], lambda x, rows=rows: x[rows])
        pair.check()


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_generation_far_past_the_expected_tokens_loses_none(plan):
    pair = Pair(plan, dtype=torch.float32)
    pair.feed(21)
    for _ in range(300):
        pair.feed(1)
    pair.check()
    assert pair.held == 321


@pytest.mark.parametrize("plan", [name for name in sorted(PLANS) if name.startswith("coarse")])
@pytest.mark.parametrize("left_out", ([0, 1, 40], [7, 0, 3], [0, 0, 100]), ids=str)
def test_rows_that_rank_fewer_tokens_keep_their_keys_where_they_are(plan, left_out):
    """Slots that a row lacks lie between its ranked tokens and its newest ones: a block may begin with one."""
    pair = Pair(plan, batch=3)
    vision = torch.arange(150) >= 4 + torch.tensor(left_out)[:, None]
    padding = torch.zeros(3, 150, dtype=torch.bool)
    if plan == "coarse text":
        vision, padding = padding, ~vision
    pair.feed(150, vision, padding)
    pair.check()
    for _ in range(40):
        pair.feed(1)
    pair.check()


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_chunks_around_the_append_limit_fit_their_masks(plan):
    pair = Pair(plan)
    vision = torch.zeros(2, 20, dtype=torch.bool)
    vision[:, 5:15] = True
    pair.feed(210)
    assert pair.cache.index.capacity == 256
    pair.feed(20, vision)
    pair.feed(MAX_APPEND)
    pair.feed(MAX_APPEND + 1)
    for _ in range(5):
        pair.feed(20, vision)
    pair.check()


@pytest.mark.parametrize("plan", [name for name in sorted(PLANS) if name != "lossless"])
def test_first_tokens_that_come_late_are_still_kept_dense(plan):
    pair = Pair(plan)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[0, :39] = padding[1, :20] = True
    pair.feed(40, None, padding)
    pair.feed(50)
    pair.check()


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_values_at_padded_positions_change_nothing(plan):
    pair = Pair(plan, batch=3)
    padding = torch.arange(60) < torch.tensor([[0], [7], [33]])
    vision = (torch.rand(3, 60, generator=pair.generator) < 0.5) & ~padding
    tokens = torch.randn(3, 60, RANK, generator=pair.generator)
    caches = []
    for garbage in (0.0, 1e3):
        cache = new_cache(PLANS[plan]())
        cache.expect(vision, padding)
        for layer in range(LAYERS):
            states = [states_of(tokens, layer, stream, torch.float32) for stream in range(2)]
            cache.update(*(x.masked_fill(padding[:, None, :, None], garbage) for x in states), layer)
        caches.append(cache)
    assert same_tokens(*caches)
    for one, other in zip(*(cache.packed_layers for cache in caches), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.basis_tensors(), other.basis_tensors(), strict=True))
    for keys, values in unpacked(caches[0]):
        assert not keys[2, :, :33].any() and not values[1, :, :7].any()


@pytest.mark.parametrize("plan", ("no tail", "sequence", "lossless"))
def test_vision_and_text_lie_in_segments_of_their_own(plan):
    pair = Pair(plan, batch=2)
    vision = torch.zeros(2, 90, dtype=torch.bool)
    vision[0, 10:50], vision[1, 30:45], vision[1, 60:80] = True, True, True
    padding = torch.zeros(2, 90, dtype=torch.bool)
    padding[1, :9] = True
    pair.feed(90, vision, padding)
    first, seen, text = pair.cache.index.positions
    assert first.tolist() == [[0, 1, 2, 3], [9, 10, 11, 12]]
    for row in range(2):
        assert seen[row][seen[row] >= 0].tolist() == vision[row].nonzero().flatten().tolist()
        rest = ~vision[row] & ~padding[row]
        rest[first[row].long()] = False
        assert text[row][(text[row] >= 0) & (text[row] < 90)].tolist() == rest.nonzero().flatten().tolist()
    assert (seen[1] == -1).sum() == 40 - 35
    layer = pair.cache.packed_layers[0]
    assert layer.pairs["vision"].slots == 40
    assert [codes.shape[2] for codes in layer.codes] == [40, 40, layer.text_slots, layer.text_slots]


@pytest.mark.parametrize(
    ("plan", "read"),
    (("no tail", [1]), ("relative", [1]), ("coarse text", [0, 2]), ("coarse vision", [2]), ("sequence", [1])),
)
def test_a_step_reads_no_segment_without_slots(plan, read):
    pair = Pair(plan, batch=2)
    for pictures in (False, True):
        vision = torch.zeros(2, 160, dtype=torch.bool)
        vision[:, 10:50] = pictures
        pair.feed(160, vision)
        layer = pair.cache.packed_layers[1]
        segments = list(range(len(pair.cache.index.plan.segments))) if pictures else read
        state, pairs = layer.state(), list(layer.pairs.values())
        assert [segment.kind for segment in state.segments] == [pairs[i].kind for i in segments]
        for i, segment in zip(segments, state.segments, strict=True):
            assert segment.slots > 0
            assert segment.key is pairs[i].key and segment.value is pairs[i].value
            assert segment.positions is layer.positions()[1 + i]
            assert segment.rotations is (layer.rotations()[i] if layer.rotations() else None)


@pytest.mark.parametrize("plan", ("coarse text", "coarse vision", "coarse several"))
def test_the_tokens_of_least_predicted_importance_are_coarse_by_layer(plan):
    pair = Pair(plan, batch=2)
    vision, padding = torch.zeros(2, 160, dtype=torch.bool), torch.zeros(2, 160, dtype=torch.bool)
    vision[0, 10:50], vision[1, 30:45], vision[1, 60:80] = True, True, True
    padding[1, :9] = True
    pair.feed(160, vision, padding)
    held, rule = pair.cache.index.plan, pair.cache.index.plan.coarse
    counted = (torch.arange(160) - torch.tensor([[0], [9]]))[..., None]
    places = pair.shown.permute(1, 2, 0) if held.has_coordinates else counted
    seen = []
    for i, layer in enumerate(pair.cache.packed_layers):
        first, coarse, *others = layer.own_positions
        scores = scores_of(*pair.dense[i], places, held.rotation, rule.weights[i])
        for row in range(2):
            packed_first = {p for p in first[row].tolist() if p >= 0}
            of_modality = vision[row] if rule.modality == "vision" else ~vision[row] & ~padding[row]
            candidates = [p for p in of_modality.nonzero().flatten().tolist() if p not in packed_first]
            candidates = [p for p in candidates if p < 160 - NEWEST]
            ranked = sorted(candidates, key=lambda p: float(scores[row, p]))
            expected = sorted(ranked[: int(0.6 * len(ranked))])
            assert coarse[row][coarse[row] >= 0].tolist() == expected
            kept = [p for positions in others for p in positions[row].tolist() if 0 <= p < 160 - held.tail_slots]
            real = {p for p in range(160 - held.tail_slots) if not padding[row, p]}
            assert sorted([*kept, *expected, *packed_first]) == sorted(real), "every token has one place"
        seen.append(coarse)
    assert not torch.equal(*seen), "each layer ranks by itself"


def test_a_plan_from_statistics_holds_its_tokens(statistics_of):
    plan = budget_plan(statistics_of(LAYERS, HEADS, HEAD_DIM), 4.0, 2000, 0.5)
    cache = new_cache(plan)
    generator = torch.Generator().manual_seed(0)
    cache.expect(torch.rand(2, 300, generator=generator) < 0.5, None)
    states = [[torch.randn(2, HEADS, 300, HEAD_DIM, generator=generator) for _ in range(2)] for _ in range(LAYERS)]
    for layer, (key, value) in enumerate(states):
        out = cache.update(key, value, layer)
        assert torch.equal(out[0], key) and torch.equal(out[1], value)
    for found, expected in zip(unpacked(cache), states, strict=True):
        for got, x in zip(found, expected, strict=True):
            assert torch.equal(got[:, :, :4], x[:, :, :4].half().float())
            assert torch.isfinite(got).all()
    report = cache.report()
    assert report["sequence_bytes"] + report["model_bytes"] == walked_bytes(cache)
    assert report["model_bytes"] > 0 and report["ratio"] == report["dense_bytes"] / report["sequence_bytes"]


def test_rows_that_share_a_basis_hold_it_once():
    own, shared = Pair("sequence", batch=3), Pair("batch", batch=3)
    for pair in (own, shared):
        pair.feed(120)
        pair.check()
    mean, decoder, step = 2 * WIDTH, 2 * RANK * WIDTH, 4 * RANK
    empty_vision = mean
    saved = 2 * LAYERS * 2 * (mean + decoder + step + empty_vision)
    assert own.cache.report()["sequence_bytes"] - shared.cache.report()["sequence_bytes"] == saved
    assert all(
        len(b) == 1 for layer in shared.cache.packed_layers for s in layer.pairs["text"].streams for b in s.basis
    )


def test_a_full_tail_of_a_sequence_basis_is_packed_anew():
    pair = Pair("sequence")
    pair.feed(50)
    layer = pair.cache.packed_layers[0]
    packed, old_basis = layer.text_slots, layer.pairs["text"].key.basis.decoder
    for _ in range(MAX_APPEND + 1):
        pair.feed(1)
    assert layer.text_slots == packed + MAX_APPEND
    assert not torch.equal(layer.pairs["text"].key.basis.decoder, old_basis)
    assert layer.cursor.tolist()[:2] == [50 + MAX_APPEND + 1, 50 + MAX_APPEND]
    pair.check()
