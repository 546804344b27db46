"""Bits by reverse water-filling, and the bytes that a plan really holds."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_plans import assert_equal
from transformers.cache_utils import DynamicCache

from apack_compile.cache.accounting import shared_tensors, storage_bytes
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.kernels.format import BANDS, WIDTHS, Bands
from apack_compile.plan.basis import BAND_GRAIN, fit, moments
from apack_compile.plan.bits import ALIGNED, TILE_BYTES, bands_of, fill_aligned, largest_ratio, runs_of, water_fill
from apack_compile.plan.budget import StreamStatistics, budget_key, budget_plan, tail_slots_for
from apack_compile.plan.plan import FIRST_TOKENS, LayerPlan, Plan
from apack_compile.plan.presets.attentionpack import attentionpack_plan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.source import PlanSource

DISTORTION = {band.bits: band.distortion for band in BANDS} | {0: 1.0}
RUNS = st.lists(
    st.tuples(st.floats(1e-9, 1e6, allow_subnormal=False), st.sampled_from((1.0, 8.0, 16.0, 48.0))),
    min_size=1,
    max_size=12,
)


def distortion_of(bits: torch.Tensor, weights: torch.Tensor) -> float:
    return float(sum(w * DISTORTION[int(b)] for w, b in zip(weights, bits, strict=True)))


@settings(max_examples=60, deadline=None)
@given(RUNS, st.floats(0, 1.2), st.floats(0, 1.2))
def test_more_budget_never_costs_quality_and_no_budget_is_exceeded(runs, one, other):
    weights, cost = (torch.tensor(column, dtype=torch.float64) for column in zip(*runs, strict=True))
    everything = 16 * float(cost.sum())
    small, large = sorted((one * everything, other * everything))
    less, more = water_fill(weights, cost, small), water_fill(weights, cost, large)
    assert float((less * cost).sum()) <= small and float((more * cost).sum()) <= large
    assert (less <= more).all()
    assert distortion_of(more, weights) <= distortion_of(less, weights)
    assert {int(b) for b in less} <= {0, *WIDTHS}


@settings(max_examples=40, deadline=None)
@given(RUNS, st.floats(0.05, 0.9))
def test_no_run_gains_more_by_two_bits_than_another_run_loses_by_them(runs, share):
    weights, cost = (torch.tensor(column, dtype=torch.float64) for column in zip(*runs, strict=True))
    bits = water_fill(weights, cost, share * 16 * float(cost.sum()))
    widths = sorted(DISTORTION)

    def slope(i: int, a: int, b: int) -> float:
        return float(weights[i] * (DISTORTION[a] - DISTORTION[b]) / (cost[i] * (b - a)))

    gains = [max(slope(i, int(b), w) for w in widths if w > b) for i, b in enumerate(bits) if b < 16]
    losses = [min(slope(i, w, int(b)) for w in widths if w < b) for i, b in enumerate(bits) if b > 0]
    if gains and losses:
        assert max(gains) <= min(losses) * (1 + 1e-6)


def test_equal_runs_get_equal_bits_and_heavier_ones_more():
    bits = water_fill(torch.tensor([1e4, 1.0, 1.0, 1e-6]).double(), torch.full((4,), 16.0).double(), 16.0 * 20)
    assert bits[1] == bits[2] and bits[0] > bits[1] > bits[3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from((0, 2, 4, 8, 16)), min_size=1, max_size=8), st.integers(1, BAND_GRAIN))
def test_bands_hold_every_run_that_has_bits(bits, last):
    lengths = [BAND_GRAIN] * (len(bits) - 1) + [last]
    bands = bands_of(bits, lengths)
    floored = [max(bits[0], 2), *bits[1:]]
    for width, count in zip(WIDTHS, bands.counts, strict=True):
        assert count == sum(length for b, length in zip(floored, lengths, strict=True) if b == width)
    assert list(bands.widths) == sorted(bands.widths, reverse=True), "bands fall"
    assert bands.components >= min(BAND_GRAIN, sum(lengths))


@pytest.mark.parametrize("width", (1, 16, 40, 192))
def test_runs_cover_every_component_once(width):
    weights = torch.rand(width)
    runs, lengths = runs_of(weights)
    assert sum(lengths) == width and max(lengths) <= BAND_GRAIN
    assert float(runs.sum()) == pytest.approx(float(weights.double().sum()))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from((128, 192, 200, 256, 1024)), min_size=1, max_size=4),
    st.floats(34.0, 90.0),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_tokens_of_plans_for_a_gpu_are_aligned_within_the_budget(widths, mean_bytes, whole_tiles, seed):
    generator = torch.Generator().manual_seed(seed)
    streams = [torch.rand(w, generator=generator).sort(descending=True).values ** 4 for w in widths]
    cost = torch.rand(len(widths), generator=generator).double() + 0.5
    budget = float(8 * mean_bytes * cost.sum())
    found = fill_aligned(streams, cost, budget, whole_tiles)
    taken = sum(
        float(c) * sum(count * bits for count, bits in zip(b.counts, WIDTHS, strict=True))
        for c, b in zip(cost, found, strict=True)
    )
    assert taken <= budget
    for stream, bands in zip(streams, found, strict=True):
        assert 0 < bands.components <= len(stream) and bands.token_bytes % ALIGNED == 0
        if whole_tiles:
            whole = [count * bits / 8 % TILE_BYTES for count, bits in zip(bands.counts, WIDTHS, strict=True)]
            assert not any(whole[:-1]) or bands.components == len(stream)


def test_a_plan_for_a_gpu_keeps_the_width_of_leading_components():
    # one component has nearly all of the variance
    stream = torch.full((192,), 1e-3)
    stream[:4] = 100.0
    (bands,) = fill_aligned([stream], torch.ones(1, dtype=torch.float64), 8 * 48.0)
    exact = water_fill(*(runs_of(stream)[0], torch.full((12,), 16.0, dtype=torch.float64)), 8 * 48.0)
    assert bands.widths[0] >= exact[0] > 2


def held(plan, tokens: int, vision_share: float, layers: int, heads: int, head_dim: int) -> dict:
    """Report of a cache of random states; only bytes count, so no basis is refitted to them."""
    layer_plans = {i: LayerPlan(*(replace(s, expected_error=1.0) for s in p.streams)) for i, p in plan.layers.items()}
    plan = replace(plan, layers=layer_plans)
    kinds = [LayerKind(i, "full_attention", None) for i in range(layers)]
    cache = CompactedCache(kinds, DynamicCache(), PlanSource(given=plan))
    generator = torch.Generator().manual_seed(tokens)
    vision = torch.zeros(1, tokens, dtype=torch.bool)
    vision[:, 5 : 5 + int(vision_share * tokens)] = True
    cache.expect(vision, None)
    cache.show_positions(torch.arange(tokens).expand(3, 1, tokens))
    for layer in range(layers):
        states = torch.randn(1, heads, tokens, head_dim, generator=generator).to(torch.bfloat16)
        cache.update(states, states, layer)
    return cache.report()


@pytest.mark.parametrize("vision_share", (0.0, 0.3, 0.9))
@pytest.mark.parametrize("ratio", (4, 6, 8))
@pytest.mark.parametrize("tokens", (1024, 3001, 8192))
@pytest.mark.parametrize(("heads", "head_dim", "groups"), ((3, 64, 1), (2, 20, 1), (4, 48, 2)))
def test_a_cache_holds_the_ratio_that_was_asked_for(
    statistics_of, heads, head_dim, groups, tokens, ratio, vision_share
):
    layers = 8
    statistics = statistics_of(layers, heads, head_dim, groups=groups, seed=heads)
    plan = budget_plan(statistics, ratio, *budget_key(tokens, vision_share))
    report = held(plan, tokens, vision_share, layers, heads, head_dim)
    assert report["tokens"] == tokens
    assert abs(report["sequence_bytes"] * ratio / report["dense_bytes"] - 1) <= 0.05


@pytest.mark.parametrize("coordinates", (None, torch.arange(16) % 3), ids=("one", "three"))
def test_rotations_and_coordinates_count_towards_the_ratio(statistics_of, coordinates):
    rotation = KeyRotation(torch.rand(16, generator=torch.Generator().manual_seed(0)), 16, coordinates=coordinates)
    plan = budget_plan(statistics_of(2, 3, 64), 8, *budget_key(8192, 0.3), rotation=rotation)
    report = held(plan, 8192, 0.3, 2, 3, 64)
    assert abs(report["sequence_bytes"] * 8 / report["dense_bytes"] - 1) <= 0.03


def test_a_prompt_too_short_for_its_budget_still_gets_a_plan(statistics_of):
    plan = budget_plan(statistics_of(2, 2, 20), 8.0, 12, 0.5)
    assert plan.tail_slots == 0
    assert all(stream.bands.components > 0 for layer in plan.layers.values() for stream in layer.streams)


def test_statistics_without_vision_put_every_token_with_the_text(statistics_of):
    plan = budget_plan(statistics_of(2, 2, 20, vision=False), 4.0, 1000, 0.5)
    assert not plan.separates_vision
    report = held(plan, 300, 0.5, 2, 2, 20)
    assert report["tokens"] == 300


def test_the_bases_of_a_plan_have_the_components_of_its_bands(statistics_of):
    plan = budget_plan(statistics_of(3, 4, 10, groups=2), 5.0, 4000, 0.5)
    assert plan.groups == 2 and not plan.per_request
    for layer, streams in plan.layers.items():
        for stream, basis in zip(streams.streams, plan.bases[layer], strict=True):
            assert stream.scope == "model" and stream.token_scale
            assert basis.decoder.shape == (1, 2, stream.bands.components, 20)
            assert basis.step.shape == (1, 2, stream.bands.components)
            for tensor in basis:
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a basis owns no more than it needs"


def test_layers_with_more_variance_get_more_bits(statistics_of):
    statistics = statistics_of(2, 2, 32)
    loud = {
        modality: tuple(type(s)(s.spectrum, s.weights * 1e3) for s in streams)
        for modality, streams in statistics[1].items()
    }
    plan = budget_plan({0: statistics[1], 1: loud}, 6.0, 4000, 0.5)
    quiet_bytes, loud_bytes = (sum(s.bands.token_bytes for s in plan.layers[i].streams) for i in range(2))
    assert loud_bytes > quiet_bytes


def test_the_tail_is_a_small_share_of_the_budget():
    assert [tail_slots_for(tokens, 4.0) for tokens in (100, 600, 1200, 10**5)] == [0, 8, 16, 32]
    assert all(tail_slots_for(t, r) <= 0.06 * t / r for t in (10, 1000, 5000) for r in (2.0, 8.0))


def test_presets_say_what_they_keep():
    ranks = {"vision_key": 3, "vision_value": 4, "text_key": 5, "text_value": 6}
    plan = attentionpack_plan([0, 2], ranks, tail_slots=64)
    assert plan.per_request and plan.tail_slots == 64 and plan.first_tokens == FIRST_TOKENS
    assert [s.bands for s in plan.layers[2].streams] == [Bands((r, 0, 0, 0)) for r in (3, 4, 5, 6)]
    lossless = lossless_plan([0, 1])
    assert not lossless.per_request and not lossless.bases
    assert {s.scope for layer in lossless.layers.values() for s in layer.streams} == {"as_is"}


@pytest.mark.parametrize("width", (8, 40, 192, 4096))
def test_the_largest_ratio_is_two_bits_in_one_run_and_a_scale(width):
    kept = min(width, BAND_GRAIN)
    assert largest_ratio(width) == pytest.approx(2 * width / (2 * kept / 8 + 2))
    assert math.isfinite(largest_ratio(width))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**5), st.floats(0, 1))
def test_prompts_of_like_length_and_share_have_one_plan(tokens, share):
    length, eighth = budget_key(tokens, share)
    assert abs(eighth - share) <= 1 / 16 + 1e-9
    assert tokens < 64 or 2**-0.26 <= length / tokens <= 2**0.26
    assert budget_key(length, eighth) == (length, eighth)


def test_a_segment_with_the_statistics_of_another_has_its_bases_too(statistics_of, tmp_path):
    plan = budget_plan(statistics_of(2, 2, 32, vision=False), 4.0, 1000, 0.5)
    own = budget_plan(statistics_of(2, 2, 32), 4.0, 1000, 0.5)
    assert storage_bytes(shared_tensors(own)) > 1.5 * storage_bytes(shared_tensors(plan))
    signed = replace(plan, signature=(2, 2, 16, "torch.float32"))
    signed.save(tmp_path / "plan")
    for one in (plan, plan.to(torch.device("cpu")), plan.to(torch.device("meta")), Plan.load(tmp_path / "plan")):
        for vision_key, vision_value, text_key, text_value in one.bases.values():
            assert vision_key is text_key and vision_value is text_value and text_key is not text_value


def test_bases_that_would_pass_their_limit_are_stored_in_16_bits(statistics_of, tmp_path):
    statistics = statistics_of(3, 4, 32, groups=2)
    wide = budget_plan(statistics, 4.0, 1000, 0.5)
    held = storage_bytes(shared_tensors(wide))
    same = budget_plan(statistics, 4.0, 1000, 0.5, basis_limit=held)
    narrow = budget_plan(statistics, 4.0, 1000, 0.5, basis_limit=held - 1)
    assert held // 2 < storage_bytes(shared_tensors(narrow)) < 0.53 * held
    for layer, bases in wide.bases.items():
        for one, equal, half in zip(bases, same.bases[layer], narrow.bases[layer], strict=True):
            assert all(map(torch.equal, one, equal))
            assert half.mean.dtype == half.decoder.dtype == torch.float16
            assert torch.equal(half.step, one.step)
            assert torch.equal(half.decoder, one.decoder.half()) and torch.equal(half.mean, one.mean.half())
    signed = replace(narrow, signature=(3, 4, 16, "torch.float32"))
    signed.save(tmp_path / "plan")
    assert_equal(Plan.load(tmp_path / "plan"), signed)


def test_components_without_variance_are_not_stored():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 1, 20_000, 20, generator=generator) @ torch.randn(20, 96, generator=generator)
    spectrum = fit(moments(sample))
    stream = StreamStatistics(spectrum, spectrum.deviation[0].square() - spectrum.deviation[0].square().min())
    plan = budget_plan({0: {"text": (stream, stream)}}, 2.0, 4000, 0.0)
    assert {one.bands.components for one in plan.layers[0].streams} == {32}, "20 components in whole runs of 16"


def test_narrow_streams_keep_their_budget_on_a_gpu(statistics_of):
    statistics = statistics_of(2, 2, 20, vision=False)
    plan = budget_plan(statistics, 4.0, 1000, 0.5, aligned=True)
    assert plan.layers == budget_plan(statistics, 4.0, 1000, 0.5).layers
