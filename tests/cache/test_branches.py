"""Branches of a packed prefix beside the dense tokens that they should hold."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pair import PLANS, Pair, flags, new_cache, reachable, same_tokens, walked_bytes

from apack_compile.cache.layer import MAX_APPEND
from apack_compile.cache.sharing import branch_of, share

SHARED = sorted(set(PLANS) - {"batch", "sequence"})


def prefix_of(plan: str, tokens: int, vision: float = 0.0, seed: int = 0) -> Pair:
    """A prefix of so many tokens, this share of them vision."""
    pair = Pair(plan, batch=1, seed=seed)
    flags = torch.rand(1, tokens, generator=pair.generator) < vision
    pair.feed(tokens, flags if vision else None)
    share(pair.cache)
    return pair


def branch(pair: Pair, rows: int, seed: int = 1) -> Pair:
    """So many rows behind it, and their dense tokens."""
    made = copy.copy(pair)
    made.cache, made.generator = branch_of(pair.cache, rows, 8), torch.Generator().manual_seed(seed)
    made.change(lambda x: x.repeat_interleave(rows, 0), lambda x: x.repeat_interleave(rows, 0))
    return made


def contents(pair: Pair) -> list[torch.Tensor]:
    """Copies of all tensors that a cache can reach."""
    return [x.clone() for x in reachable(pair.cache, set()) if x.device.type != "meta"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trees_of_branches_hold_their_tokens_and_leave_the_prefix_as_it_was(data):
    plan = data.draw(st.sampled_from(SHARED))
    prefix = prefix_of(
        plan,
        data.draw(st.sampled_from((5, 12, 40, 75))),
        data.draw(st.sampled_from((0.0, 0.4))),
        data.draw(st.integers(0, 99)),
    )
    before, branches = contents(prefix), []
    for seed in range(data.draw(st.integers(1, 3))):
        branches.append(branch(prefix, data.draw(st.sampled_from((1, 2, 3))), seed))
    for _ in range(data.draw(st.integers(1, 8))):
        pair = data.draw(st.sampled_from(branches))
        step = data.draw(st.sampled_from(("feed", "feed", "feed", "crop", "reorder", "select", "repeat", "copy")))
        if step == "feed":
            count = data.draw(st.sampled_from((1, 1, 3, 9, MAX_APPEND, MAX_APPEND + 7)))
            pair.feed(count, *data.draw(flags(pair, count)))
        elif step == "crop":
            own = pair.held - prefix.held
            count = data.draw(st.integers(0, min(own, pair.cache.croppable)))
            pair.cache.crop(-count)
            left = pair.held - count
            pair.change(lambda x, left=left: x[:, :, :left], lambda x, left=left: x[:, :left])
        elif step == "copy":
            twin = copy.copy(pair)
            twin.dense = list(pair.dense)
            twin.cache, twin.generator = copy.deepcopy(pair.cache), torch.Generator().manual_seed(9)
            branches.append(twin)
        elif step == "repeat":
            pair.cache.batch_repeat_interleave(2)
            pair.change(lambda x: x.repeat_interleave(2, 0), lambda x: x.repeat_interleave(2, 0))
        else:
            rows = pair.batch if step == "reorder" else 1
            order = torch.randint(pair.batch, (rows,), generator=pair.generator)
            (pair.cache.reorder_cache if step == "reorder" else pair.cache.batch_select_indices)(order)
            pair.change(lambda x, order=order: x[order], lambda x, order=order: x[order])
    for pair in branches:
        pair.check()
    after = contents(prefix)
    assert len(before) == len(after) and all(map(torch.equal, before, after)), "the prefix changed"


@pytest.mark.parametrize("plan", SHARED)
def test_a_prefix_is_the_same_memory_in_all_branches_and_their_copies(plan):
    prefix = prefix_of(plan, 75, 0.3)
    one, many = branch(prefix, 1), branch(prefix, 7)
    sizes = {}
    for rows, pair in ((1, one), (7, many), (8, branch(prefix, 8))):
        report = pair.cache.report()
        assert report["sequence_bytes"] + report["model_bytes"] == walked_bytes(pair.cache)
        sizes[rows] = report["sequence_bytes"]
    own = sizes[8] - sizes[7]
    assert sizes[7] - sizes[1] == 6 * own, "a prefix, and as many bytes for each row"
    for cache in (one.cache, many.cache, copy.deepcopy(many.cache)):
        for layer, first in zip(cache.packed_layers, prefix.cache.packed_layers, strict=True):
            assert layer.shared is first.shared and layer.shared.tensors


@pytest.mark.parametrize("plan", SHARED)
def test_only_a_branchs_own_tokens_can_be_cropped(plan):
    prefix = prefix_of(plan, 40)
    pair = branch(prefix, 2)
    pair.feed(3)
    with pytest.raises(
        ValueError, match="cannot remove 4 of 43 tokens; only the newest 3 can go, the others are the prefix"
    ):
        pair.cache.crop(-4)
    pair.cache.crop(-3)
    pair.change(lambda x: x[:, :, :40], lambda x: x[:, :40])
    pair.check()
    with pytest.raises(ValueError, match="the others are the prefix"):
        pair.cache.crop(-1)


@pytest.mark.parametrize("plan", SHARED)
@pytest.mark.parametrize("count", (2, MAX_APPEND + 5))
def test_states_that_are_not_finite_leave_a_branch_as_it_was(plan, count):
    prefix = prefix_of(plan, 40)
    pair = branch(prefix, 2)
    pair.feed(1)
    kept = copy.deepcopy(pair.cache)
    bad = torch.full((2, 2, count, 10), float("nan"))
    with pytest.raises(ValueError, match="layer 0: key"):
        for layer in range(2):
            pair.cache.update(bad, bad, layer)
    assert same_tokens(pair.cache, kept)
    pair.feed(1)
    pair.check()


@pytest.mark.parametrize("plan", ("batch", "sequence"))
def test_rows_with_bases_of_their_own_share_nothing(plan):
    pair = Pair(plan, batch=1)
    pair.feed(40)
    with pytest.raises(ValueError, match=r"prefix: .*use ratio=, or preset='lossless'"):
        share(pair.cache)


def test_a_prefix_is_one_row_that_was_read_and_not_a_branch():
    with pytest.raises(ValueError, match="prefix: the cache holds no tokens"):
        share(new_cache(PLANS["tail"]()))
    pair = Pair("tail", batch=2)
    pair.feed(9)
    with pytest.raises(ValueError, match="prefix: one prompt is read at a time; the cache holds 2"):
        share(pair.cache)
    prefix = prefix_of("tail", 40)
    with pytest.raises(ValueError, match="prefix: the cache is one already, or a branch of one"):
        share(branch(prefix, 1).cache)


def test_a_branch_that_is_reset_holds_the_next_prompt():
    pair = branch(prefix_of("relative", 40), 2)
    pair.feed(2)
    pair.cache.reset()
    pair.forget()
    pair.feed(50)
    pair.check()
