"""Tiers: importance against float64, eviction, and positions that survive every permutation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_plans import write
from transformers.cache_utils import DynamicCache

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.cache.watch import newest_attention, newest_rows
from apack_compile.plan.file import tensors_of, values_of
from apack_compile.plan.plan import Plan
from apack_compile.plan.presets.a_vl import AVLOptions
from apack_compile.plan.presets.attentionpack import AttentionPackOptions, attentionpack_plan
from apack_compile.plan.presets.base import half_plan
from apack_compile.plan.presets.snapkv import SnapKVOptions
from apack_compile.plan.source import PlanSource
from apack_compile.plan.tiers import (
    Tokens,
    at_positions,
    most_scored,
    newest_without_gap,
    places_of,
    share_of,
    to_positions,
)

HEADS, HEAD_DIM = 2, 5
RANKS = {"vision_key": 3, "vision_value": 4, "text_key": 3, "text_value": 4}


def cache_of(plan, batch, tokens, seed, padding=True):
    """A one-layer cache of a prompt, its exact states, and which tokens are vision and padding."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [LayerKind(0, "full_attention", None)]
    cache = CompactedCache(kinds, DynamicCache(), PlanSource(given=plan))
    key, value = torch.randn(2, batch, HEADS, tokens, HEAD_DIM, generator=generator, dtype=torch.float64)
    starts = torch.randint(0, 5, (batch, 1), generator=generator) if padding else torch.zeros(batch, 1)
    hidden = torch.arange(tokens) < starts
    vision = (torch.rand(batch, tokens, generator=generator) < 0.6) & ~hidden
    cache.expect(vision, hidden)
    cache.update(key, value, 0)
    return cache, key, value, vision, hidden, generator


def attention_of(cache, generator, batch, tokens):
    """Random attention over positions."""
    return torch.rand(batch, tokens, generator=generator)


@given(st.integers(0, 1000), st.integers(1, 100))
def test_a_share_is_rounded_up_exactly(count, percent):
    assert share_of(torch.tensor([count]), percent / 100).item() == -(-count * percent // 100)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from((1, 2, 3)),
    st.integers(1, 9),
    st.sampled_from(("none", "bool", "float")),
    st.integers(0, 999),
)
def test_importance_is_made_of_the_head_mean_attention_of_the_newest_queries(batch, share, rows, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = rows + seed % 7
    query = torch.randn(batch, HEADS * share, rows, HEAD_DIM, generator=generator)
    key = torch.randn(batch, HEADS, tokens, HEAD_DIM, generator=generator)
    asked = torch.randint(-1, rows, (batch, 3), generator=generator)
    allowed = (
        torch.ones(rows, tokens, dtype=torch.bool).tril(tokens - rows)[None, None].expand(batch, 1, -1, -1).clone()
    )
    mask = None
    if kind != "none":
        allowed &= torch.rand(batch, 1, rows, tokens, generator=generator) < 0.8
        allowed[..., 0] = True
        mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    got = newest_attention(query, key, mask, 0.3, asked)
    scores = query.double() @ key.double().repeat_interleave(share, 1).mT * 0.3
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).mean(1)
    expected = torch.stack([weights[b, asked[b].clamp_min(0)] for b in range(batch)]) * (asked >= 0)[..., None]
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_newest_rows_are_real_tokens():
    none = newest_rows(4, 3, np.zeros((1, 5), bool))
    assert none.tolist() == [[4, 3, 2]]
    padding = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0]], bool)
    assert newest_rows(4, 3, padding).tolist() == [
        [4, 3, -1],
        [2, 1, 0],
        [4, -1, -1],
        [4, 2, 0],
    ]
    assert newest_rows(1, 3, padding).tolist() == [[1, -1], [1, 0], [1, -1], [0, -1]]


@given(st.integers(1, 40), st.integers(0, 999))
def test_values_by_position_survive_slots(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(tokens, generator=generator)[None].to(torch.int32)
    values = torch.rand(1, tokens, generator=generator)
    assert torch.equal(at_positions(to_positions(values, positions, tokens), positions), values)
    positions[0, 0] = -1
    assert at_positions(values, positions)[0, 0] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.floats(0, 1),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(0, 999),
)
def test_text_keeps_first_newest_and_heavy_hitters(counts, share, first, heavy_share, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = 31
    positions = torch.full((len(counts), slots), -1, dtype=torch.int32)
    for b, count in enumerate(counts):
        positions[b, torch.randperm(slots, generator=generator)[:count]] = torch.arange(count, dtype=torch.int32) * 2
    importance = torch.rand(len(counts), slots, generator=generator)
    rule, held = AVLOptions(text_kept=share, text_first=first, text_heavy=heavy_share), positions >= 0
    seen, place = torch.tensor(counts), places_of(positions, held)
    tokens = Tokens(("text",), importance, held, place, held.sum(1), seen)
    keep = most_scored(rule.score(tokens), rule.budget(tokens), tokens)
    recent = newest_without_gap(keep, positions, held)
    for b, count in enumerate(counts):
        kept = sorted(positions[b, keep[b]].tolist())
        budget = min(max(math.ceil(share * count - 1e-9), first), count)
        assert len(kept) == budget
        everything = [2 * i for i in range(count)]
        assert kept[: min(first, budget)] == everything[: min(first, budget)]
        newest = int(recent[b])
        assert kept[len(kept) - newest :] == everything[count - newest :]
        weight = dict(zip(positions[b].tolist(), importance[b].tolist(), strict=True))
        middle = kept[min(first, budget) : len(kept) - newest]
        dropped = [weight[p] for p in everything if p not in kept]
        assert not middle or not dropped or min(weight[p] for p in middle) >= max(dropped)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from((1, 3)), st.integers(20, 50), st.integers(1, 5), st.integers(0, 999))
def test_positions_survive_random_refreshes(batch, tokens, refreshes, seed):
    plan = attentionpack_plan([0], RANKS, 32, AttentionPackOptions())
    cache, key, _, _, _, generator = cache_of(plan, batch, tokens, seed)
    layer = cache.layers[0]
    none = key[:, :, :0]

    def unpacked():
        return torch.ops.apack.unpack(none, none, *layer.state().flatten(), tokens, *layer.tier_state())

    before = unpacked()
    cache.settle(layer, attention_of(cache, generator, batch, tokens))
    addresses = [t.data_ptr() for t in (*layer.packed_tensors()[:4], *layer.tiers.tensors()[1:2])]
    for _ in range(refreshes):
        layer.tiers.importance[0].copy_(torch.rand(layer.tiers.importance[0].shape, generator=generator))
        layer.rank()
        found = layer.tiers.importance[0].masked_fill(layer.tiers.positions[1] < 0, -1)
        assert (found.diff(dim=1) <= 0).all()
    for got, expected in zip(unpacked(), before, strict=True):
        assert torch.equal(got, expected)
    assert [t.data_ptr() for t in layer.packed_tensors()[:4]] == addresses[:4]


@pytest.mark.parametrize("batch", (1, 4))
def test_eviction_keeps_the_most_attended_and_frees_bytes(batch):
    tokens = 60
    options = AVLOptions(core=0.25, secondary=0.5, text_kept=0.5, text_first=3)
    cache, _, _, vision, hidden, generator = cache_of(half_plan([0], options), batch, tokens, 7)
    layer = cache.layers[0]
    before = cache.report()["sequence_bytes"]
    attention = attention_of(cache, generator, batch, tokens)
    cache.settle(layer, attention)
    assert cache.report()["sequence_bytes"] < 0.75 * before
    for b in range(batch):
        count = int(vision[b].sum())
        held = [p for p in layer.tiers.positions[1][b].tolist() if p >= 0]
        ranked = sorted(vision[b].nonzero()[:, 0].tolist(), key=lambda p: -float(attention[b, p]))
        assert held == ranked[: -(-count // 2)]
        assert layer.tiers.read[b].tolist() == [count, -(-count // 4)]
        text = (~vision[b] & ~hidden[b]).nonzero()[:, 0].tolist()
        kept = [p for p in layer.tiers.positions[2][b].tolist() if 0 <= p < tokens]
        assert kept == sorted(kept) and len(kept) == max(-(-len(text) // 2), 3)
        assert kept[:3] == text[:3] and kept[-1] == text[-1]


def test_crop_stops_at_what_a_pruning_moved():
    cache, *_, generator = cache_of(half_plan([0], AVLOptions(text_first=2)), 1, 60, 3)
    cache.settle(cache.layers[0], attention_of(cache, generator, 1, 60))
    room = cache.croppable
    with pytest.raises(ValueError, match=f"only the newest {room} can go"):
        cache.crop(-room - 1)
    cache.crop(-room)
    assert int(cache.get_seq_length()) == 60 - room


@pytest.mark.parametrize("preset", ("attentionpack", "a-vl"))
def test_attend_tiers_declares_what_it_does(preset):
    plan = (
        attentionpack_plan([0], RANKS, 32, AttentionPackOptions())
        if preset == "attentionpack"
        else half_plan([0], AVLOptions())
    )
    cache, *_, generator = cache_of(plan, 2, 40, 5)
    layer = cache.layers[0]
    cache.settle(layer, attention_of(cache, generator, 2, 40))
    new = torch.randn(2, HEADS, 1, HEAD_DIM, generator=generator, dtype=torch.float64)
    cache.update(new, new, 0)
    query = torch.randn(2, HEADS * 2, 1, HEAD_DIM, generator=generator, dtype=torch.float64)
    state = (query, new, new, None, *layer.state().flatten(), None, *layer.tier_state())
    torch.library.opcheck(torch.ops.apack.attend_tiers.default, state)


@pytest.mark.parametrize(
    ("options", "change"),
    (
        (AttentionPackOptions, {"evict": 1}),
        (AttentionPackOptions, {"partial": 0.0}),
        (AttentionPackOptions, {"full": -0.1}),
        (AttentionPackOptions, {"ema": 1.5}),
        (AttentionPackOptions, {"refresh_every": 0}),
        (AVLOptions, {"core": 0.6}),
        (AVLOptions, {"text_first": 0}),
        (SnapKVOptions, {"kept": 0.0}),
        (SnapKVOptions, {"kept": 2}),
        (SnapKVOptions, {"window": 0}),
        (SnapKVOptions, {"kernel": 4}),
    ),
)
def test_options_that_make_no_sense_are_refused(options, change):
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{options.name.replace('-', '.')}: .*{name}={value}"):
        options(**change)


TIERED = {
    "attentionpack": attentionpack_plan([0, 1], RANKS, 32, AttentionPackOptions(evict=0.3, bits=4)),
    "a-vl": half_plan([0, 1], AVLOptions(core=0.2)),
    "snapkv": half_plan([0, 1], SnapKVOptions(kept=0.2)),
}


def signed(plan):
    return replace(plan, signature=(2, HEADS, HEAD_DIM, "torch.float32"))


@pytest.mark.parametrize("preset", TIERED)
def test_a_plan_with_tiers_survives_a_file(preset, tmp_path):
    plan = signed(TIERED[preset])
    plan.save(tmp_path / "plan")
    found = Plan.load(tmp_path / "plan")
    assert (found.layers, found.tiers, found.tail_slots) == (plan.layers, plan.tiers, plan.tail_slots)


@pytest.mark.parametrize("preset", ("attentionpack", "a-vl"))
def test_the_tiers_of_files_of_format_6_are_those_of_their_preset(preset, tmp_path):
    plan = signed(TIERED[preset])
    rule = plan.tiers
    earlier = {name: getattr(rule, name) for name in ("full", "partial", "attended", "kept", "refresh_every")}
    earlier |= {"ema": list(rule.decay), "text": None}
    if preset == "a-vl":
        earlier["text"] = {"kept": 0.5, "first": 20, "heavy": 0.7, "every": 8}
    write(tmp_path / "plan", values_of(plan) | {"tiers": earlier}, tensors_of(plan), version="6")
    assert Plan.load(tmp_path / "plan").tiers == rule
    write(tmp_path / "plan", values_of(plan) | {"tiers": earlier}, tensors_of(plan))
    with pytest.raises(ValueError, match="not laid out as plan format 7 says"):
        Plan.load(tmp_path / "plan")


def test_ranks_must_be_as_many_as_the_packed_layers():
    with pytest.raises(ValueError, match="vision_key has 2 ranks, but 3 layers"):
        attentionpack_plan([0, 1, 2], {**RANKS, "vision_key": [4, 4]}, 32)
    plan = attentionpack_plan([0, 1], {**RANKS, "vision_key": [4, 7]}, 32)
    assert [plan.layers[i].vision_key.bands.components for i in (0, 1)] == [4, 7]
