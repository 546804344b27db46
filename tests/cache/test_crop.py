"""Tokens that may be cropped again, in a loop of one's own: any number of them, over any plan and window."""

import copy

import pytest
import torch
from packed_pair import HEAD_DIM, HEADS, LAYERS, PLANS, RANKS, Pair, same_tokens
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from windowed_pair import PLANS as WINDOWED_PLANS
from windowed_pair import WINDOWS, WindowedPair

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.plan.presets.a_vl import AVLOptions
from apack_compile.plan.presets.attentionpack import AttentionPackOptions, attentionpack_plan
from apack_compile.plan.presets.base import half_plan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.source import PlanSource


def crop(pair, count):
    """The newest tokens out of the cache and out of what it should hold."""
    pair.cache.crop(-count)
    left = pair.held - count
    pair.change(lambda x: x[:, :, :left], lambda x: x[:, :left])


def make(plan, windows):
    return Pair(plan) if windows is None else WindowedPair(plan, WINDOWS[windows])


CASES = [(plan, None) for plan in sorted(PLANS)] + [
    (plan, windows) for plan in WINDOWED_PLANS for windows in ("one full", "two windows")
]


@pytest.mark.parametrize(("plan", "windows"), CASES)
def test_any_number_of_tokens_can_be_cropped_while_the_past_is_recorded(plan, windows):
    pair = make(plan, windows)
    pair.feed(50)
    pair.cache.activate_past_recording()
    pair.feed(41)
    pair.check()
    crop(pair, 41)
    pair.check()
    # one token that stays, and a draft
    pair.feed(1)
    pair.feed(37)
    crop(pair, 37)
    for count in (1, 45, 7, 33):
        pair.feed(count)
    crop(pair, 85)
    pair.check()
    pair.feed(59)
    crop(pair, 0)
    pair.feed(60)
    crop(pair, 59)
    pair.feed(3)
    pair.check()


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_crop_that_is_refused_says_what_is_allowed_and_changes_nothing(plan):
    pair = Pair(plan)
    with pytest.raises(ValueError, match="cannot remove 3 of 0 tokens; only the newest 0 can go"):
        pair.cache.crop(-3)
    pair.feed(43)
    pair.feed(41)
    kept, loose = copy.deepcopy(pair.cache), pair.cache.croppable
    assert loose == 32
    with pytest.raises(
        ValueError, match=f"cannot remove 84 of 84 tokens; only the newest {loose} can go.* activate_past"
    ):
        pair.cache.crop(torch.tensor(-84))
    with pytest.raises(TypeError, match="float"):
        pair.cache.crop(-2.5)
    assert same_tokens(pair.cache, kept)
    crop(pair, loose)
    pair.check()
    pair.cache.activate_past_recording()
    pair.feed(40)
    with pytest.raises(ValueError, match=r"only the newest 40 can go, the others are packed for good$"):
        pair.cache.crop(-41)
    pair.cache.deactivate_past_recording()
    pair.feed(34)
    assert pair.cache.croppable == 32
    pair.check()


def test_rows_in_another_order_can_be_cropped():
    pair = Pair("relative", batch=3)
    pair.feed(37)
    pair.cache.activate_past_recording()
    pair.feed(45)
    rows = torch.tensor([2, 0, 0])
    pair.cache.reorder_cache(rows)
    pair.change(lambda x: x[rows], lambda x: x[rows])
    crop(pair, 44)
    pair.feed(5)
    pair.check()


def test_a_chunk_that_did_not_end_is_forgotten_by_a_crop():
    pair = Pair("tail")
    pair.feed(37)
    kept = copy.deepcopy(pair.cache)
    one = torch.randn(2, HEADS, 1, HEAD_DIM)
    pair.cache.update(one, one, 0)
    pair.cache.crop(0)
    assert same_tokens(pair.cache, kept)
    pair.feed(1)
    pair.check()


def test_pictures_behind_text_that_gave_a_block_of_the_ring_away_keep_the_window():
    pair = WindowedPair("lossless", WINDOWS["one full"], batch=1)
    for count in (4, 1, 26):
        pair.feed(count)
    pair.feed(6, torch.ones(1, 6, dtype=torch.bool))
    pair.check()


def test_a_window_that_transformers_keeps_is_asked_before_anything_is_cropped():
    own = DynamicCache()
    own.layers = [None, DynamicSlidingWindowLayer(5)]
    kinds = [LayerKind(0, "full_attention", None), LayerKind(1, "sliding_attention", "its keys are latents")]
    cache = CompactedCache(kinds, own, PlanSource(given=lossless_plan([0])))
    states = torch.randn(1, HEADS, 11, HEAD_DIM)
    for layer in range(2):
        cache.update(states, states, layer)
    with pytest.raises(ValueError, match="cannot remove 2 tokens; the full window of layers 1 cannot go back"):
        cache.crop(-2)
    cache.crop(0)
    assert int(cache.get_seq_length()) == 11
    cache.activate_past_recording()
    for layer in range(2):
        cache.update(states, states, layer)
    cache.crop(-9)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [13, 13]


def evicting():
    """A cache that evicts text."""
    return ranking(half_plan(range(LAYERS), AVLOptions(text_first=3, text_every=2)))


def ranking(plan, batch=2):
    """A cache with tiers, and a function that stores a chunk and shows its attention."""
    generator = torch.Generator().manual_seed(5)
    kinds = [LayerKind(layer, "full_attention", None) for layer in range(LAYERS)]
    cache = CompactedCache(kinds, DynamicCache(), PlanSource(given=plan))

    def store(count, vision=None):
        cache.expect(vision, None)
        for layer in range(LAYERS):
            states = torch.randn(batch, HEADS, count, HEAD_DIM, generator=generator)
            cache.update(states, states, layer)
        for layer in cache.packed_layers:
            if not layer.tiers.settled:
                cache.settle(layer, torch.rand(batch, int(cache.get_seq_length()), generator=generator))
            for known in layer.tiers.importance:
                known += torch.rand(known.shape, generator=generator) * (known > 0)

    return cache, store


def text_of(cache):
    """Positions of the text of each layer and row."""
    held = int(cache.get_seq_length())
    return [[[p for p in row if 0 <= p < held] for row in x.tiers.positions[2].tolist()] for x in cache.packed_layers]


def test_what_may_be_cropped_is_not_evicted():
    cache, store = evicting()
    store(47)
    cache.activate_past_recording()
    for count in (1, 3, 35, 1, 1, 1, 1):
        store(count)
    new = list(range(47, 90))
    assert all(row[-43:] == new for layer in text_of(cache) for row in layer)
    cache.crop(-41)
    assert all(row[-2:] == [47, 48] for layer in text_of(cache) for row in layer)
    # a crop says that the others stay: the next prunings count them
    for _ in range(5):
        store(1)
        cache.crop(0)
    for layer, rows in zip(cache.packed_layers, text_of(cache), strict=True):
        assert layer.tiers.seen[:, 1].tolist() == [layer.tiers.end] * 2
        assert {len(row) for row in rows} == {-(-layer.tiers.end // 2) + 54 - layer.tiers.end}
        assert layer.tiers.end >= 52


def test_a_draft_leaves_no_trace_in_what_is_counted():
    cache, store = evicting()
    store(47)
    cache.activate_past_recording()
    store(9)
    cache.crop(-7)
    layer = cache.packed_layers[0]
    assert not layer.tiers.importance[1][layer.tiers.positions[2] >= 49].any()
    pictures = torch.zeros(2, 40, dtype=torch.bool)
    pictures[:, :20] = True
    store(40, pictures)
    # the text behind the pictures may still be cropped
    assert layer.tiers.seen.tolist() == [[20, 49]] * 2 and cache.croppable == 20


def test_pictures_that_come_after_a_crop_are_all_counted():
    cache, store = ranking(attentionpack_plan(range(LAYERS), RANKS, 32, AttentionPackOptions()))
    store(41)
    cache.crop(-17)
    store(13, torch.ones(2, 13, dtype=torch.bool))
    for layer in cache.packed_layers:
        assert layer.tiers.seen[:, 0].tolist() == [13] * 2
