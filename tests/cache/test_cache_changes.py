"""A packed cache after what is refused, and after crop, copy, reset and another order of rows."""

import copy

import pytest
import torch
from packed_pair import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    PLANS,
    RANK,
    RANKS,
    WIDTH,
    Pair,
    new_cache,
    reachable,
    same_tokens,
    states_of,
)

from apack_compile.cache import fitted
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer import MAX_APPEND
from apack_compile.plan.presets.attentionpack import AttentionPackOptions, attentionpack_plan


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_crop_gives_back_the_newest_tokens_only(plan):
    pair = Pair(plan)
    pair.feed(40)
    before = copy.deepcopy(pair.cache)
    for _ in range(3):
        pair.feed(1)
    loose = pair.held - pair.cache.groups.floor
    with pytest.raises(ValueError, match=f"cannot remove {loose + 1} of 43"):
        pair.cache.crop(-loose - 1)
    with pytest.raises(ValueError, match="negative"):
        pair.cache.crop(2)
    assert int(pair.cache.get_seq_length()) == 43
    pair.cache.crop(-3)
    assert int(pair.cache.get_seq_length()) == 40
    if plan not in ("tail", "relative", "interleaved", "several coordinates", "coarse vision"):
        assert same_tokens(pair.cache, before)


@pytest.mark.parametrize("bad", (float("nan"), float("-inf")), ids=str)
@pytest.mark.parametrize("where", ((0, 0), (0, 1), (LAYERS - 1, 0), (LAYERS - 1, 1)), ids=str)
@pytest.mark.parametrize("count", (1, 7, 12, MAX_APPEND + 8))
@pytest.mark.parametrize("held", (0, 37))
@pytest.mark.parametrize("plan", sorted(PLANS))
def test_states_that_are_not_finite_leave_the_cache_as_it_was(plan, held, count, where, bad):
    pair = Pair(plan)
    if held:
        pair.feed(held)
        for _ in range(7):
            pair.feed(1)
        kept = copy.deepcopy(pair.cache)
    bad_layer, bad_stream = where
    tokens = torch.randn(2, count, RANK, generator=pair.generator)

    def store(cache: CompactedCache, spoil: bool) -> None:
        for layer in range(LAYERS):
            chunk = [states_of(tokens, layer, stream, torch.float32) for stream in range(2)]
            if spoil and layer == bad_layer:
                chunk[bad_stream][1, 0, count // 2, 3] = bad
            cache.update(*chunk, layer)

    report = pair.cache.report()
    with pytest.raises(ValueError, match=f"layer {bad_layer}: {('key', 'value')[bad_stream]}"):
        store(pair.cache, spoil=True)
    if held:
        assert same_tokens(pair.cache, kept)
        for one, other in zip(pair.cache.packed_layers, kept.packed_layers, strict=True):
            assert torch.equal(one.cursor, other.cursor)
        assert pair.cache.report()["tokens"] == report["tokens"]
    else:
        assert not pair.cache.is_filled and int(pair.cache.get_seq_length()) == 0
        assert pair.cache.report() == report
        kept = new_cache(PLANS[plan]())
    store(pair.cache, spoil=False)
    store(kept, spoil=False)
    assert same_tokens(pair.cache, kept), "and it goes on as if nothing had happened"


@pytest.mark.parametrize("plan", ("lossless", "tail"))
@pytest.mark.parametrize(
    ("states", "message"),
    (
        (torch.zeros(3, HEADS, 1, HEAD_DIM), "batch size is 3, but this cache holds 2"),
        (torch.zeros(2, HEADS + 1, 1, HEAD_DIM), "number of KV heads is 3"),
        (torch.zeros(2, HEADS, 1, HEAD_DIM + 2), "head_dim is 12"),
        (torch.zeros(2, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16), "dtype is torch.bfloat16"),
    ),
    ids=("batch", "heads", "head_dim", "dtype"),
)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_states_of_another_shape_or_dtype_are_refused(plan, states, message, layer):
    pair = Pair(plan)
    pair.feed(30)
    kept = copy.deepcopy(pair.cache)
    good = torch.zeros(2, HEADS, 1, HEAD_DIM)
    with pytest.raises(ValueError, match=message):
        for i in range(layer + 1):
            chosen = states if i == layer else good
            pair.cache.update(chosen, chosen, i)
    assert same_tokens(pair.cache, kept)
    pair.feed(1)
    pair.check()


def test_large_states_are_refused_where_half_precision_cannot_hold_them():
    large = torch.full((1, HEADS, 5, HEAD_DIM), 1e5)
    cache = new_cache(PLANS["tail"]())
    for states in (large, large.double()):
        with pytest.raises(ValueError, match="layer 0: key states reach 1e\\+05, past float16"):
            for layer in range(LAYERS):
                cache.update(states, states, layer)
    lossless = new_cache(PLANS["lossless"]())
    for layer in range(LAYERS):
        assert torch.equal(lossless.update(large, large, layer)[0], large)


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_deep_copy_is_independent(plan):
    pair = Pair(plan)
    pair.feed(45)
    pair.feed(1)
    twin = copy.deepcopy(pair.cache)
    frozen = copy.deepcopy(pair.cache)
    for _ in range(20):
        pair.feed(1)
    pair.cache.reorder_cache(torch.tensor([1, 1]))
    assert same_tokens(twin, frozen)
    assert twin.report()["sequence_bytes"] == frozen.report()["sequence_bytes"]
    own, other = ({t.data_ptr() for t in reachable(cache, set()) if t.numel()} for cache in (pair.cache, twin))
    assert not own & other


def test_a_reset_cache_holds_the_next_prompt_like_a_new_one():
    pair, fresh = Pair("tail", seed=1), Pair("tail", seed=2)
    pair.feed(80)
    pair.cache.reset()
    pair.forget()
    pair.generator.manual_seed(2)
    pair.feed(50)
    fresh.feed(50)
    assert same_tokens(pair.cache, fresh.cache)
    assert pair.cache.report() == fresh.cache.report()


@pytest.mark.parametrize("change", ("reorder", "select", "repeat"))
@pytest.mark.parametrize("plan", ("relative", "several coordinates"))
def test_rows_with_other_padding_keep_their_rotations(plan, change):
    pair = Pair(plan, batch=3)
    padding = torch.arange(30) < torch.tensor([[0], [7], [19]])
    vision = torch.rand(3, 30, generator=pair.generator) < torch.tensor([[0.2], [0.5], [0.8]])
    pair.feed(30, vision=vision & ~padding, padding=padding)
    rows = {"reorder": [2, 0, 0], "select": [2, 1], "repeat": [0, 0, 1, 1, 2, 2]}[change]
    if change == "reorder":
        pair.cache.reorder_cache(torch.tensor(rows))
    elif change == "select":
        pair.cache.batch_select_indices(torch.tensor(rows))
    else:
        pair.cache.batch_repeat_interleave(2)
    pair.change(lambda x: x[rows], lambda x: x[rows])
    pair.check()
    for _ in range(60):
        pair.feed(1)
    pair.check()


@pytest.mark.parametrize("scope", ("sequence", "batch"))
def test_a_basis_fitted_anew_starts_from_the_earlier_one(scope, monkeypatch):
    starts, fit = [], fitted.fit_to_these
    monkeypatch.setattr(fitted, "fit_to_these", lambda *given: starts.append(given[3]) or fit(*given))
    options = AttentionPackOptions(1.0, 1.0, basis=scope)
    cache = new_cache(attentionpack_plan(range(LAYERS), RANKS, MAX_APPEND, options))
    tokens = torch.randn(2, 90, RANK, generator=torch.Generator().manual_seed(3))
    for part in (tokens[:, :50], tokens[:, 50:]):
        cache.expect(None, None)
        starts.clear()
        for layer in range(LAYERS):
            cache.update(*(states_of(part, layer, stream, torch.float32) for stream in range(2)), layer)
        text = [start for start in starts if start is not None]
        assert len(text) == (0 if part.shape[1] == 50 else LAYERS)
    streams = 2 * (2 if scope == "sequence" else 1)
    assert all(start.shape == (streams, 1, RANK, WIDTH) for start in text)
