"""Memory that packing a prompt takes for a while."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import DynamicCache

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.plan.budget import budget_plan
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.source import PlanSource

LAYERS, HEADS, HEAD_DIM, TOKENS = 5, 4, 32, 8192


@pytest.fixture
def cache(statistics_of) -> CompactedCache:
    """One with relative keys, whose bases fit no random states."""
    rotation = KeyRotation(1.0 / 100 ** torch.linspace(0, 1, HEAD_DIM // 2), block=64)
    plan = budget_plan(statistics_of(LAYERS, HEADS, HEAD_DIM), 6.0, TOKENS, 0.4, rotation=rotation)
    kinds = [LayerKind(layer, "full_attention", None) for layer in range(LAYERS)]
    return CompactedCache(kinds, DynamicCache(), PlanSource(given=plan))


def states(seed: int) -> torch.Tensor:
    """Bfloat16 `[1, H, T, D]` of few directions, as a model's projection lays them out."""
    generator = torch.Generator().manual_seed(seed)
    tokens, mixing = (torch.randn(*shape, generator=generator) for shape in ((1, TOKENS, 8), (8, HEADS * HEAD_DIM)))
    return (tokens @ mixing).unflatten(-1, (HEADS, HEAD_DIM)).to(torch.bfloat16).transpose(1, 2)


def peak_bytes(prof: profile) -> int:
    """Most that was allocated at once, above what was before."""
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("pictures", (0, 1500), ids=("text", "pictures"))
def test_a_layer_takes_no_more_than_three_times_its_keys_and_values_for_a_while(cache, pictures):
    vision = torch.zeros(1, TOKENS, dtype=torch.bool)
    vision[:, 300 : 300 + pictures // 2] = vision[:, 2000 : 2000 + pictures // 2] = True
    cache.expect(vision, None)
    for layer in range(2):
        key, value = states(layer), states(10 + layer)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            cache.update(key, value, layer)
    assert 0 < peak_bytes(prof) <= 3 * (key.nbytes + value.nbytes)


def test_exact_tokens_are_kept_of_few_layers_until_it_is_known_whether_their_bases_fit(cache):
    cache.expect(None, None)
    for layer in range(LAYERS):
        cache.update(states(layer), states(10 + layer), layer)
        assert len(cache._checks._open) <= 2
    assert not cache._checks._open
    refitted = [i for i, layer in enumerate(cache.packed_layers) if "text_value" in layer.refitted]
    assert {0, LAYERS - 1} <= set(refitted), "read while later layers came, and after the last one"
    none = torch.empty(1, HEADS, 0, HEAD_DIM, dtype=torch.bfloat16)
    for i in refitted:
        layer = cache.packed_layers[i]
        _, value = torch.ops.apack.unpack(none, none, *layer.state().flatten(), TOKENS)
        expected = states(10 + i).float()
        lost = (value - expected).square().sum() / (expected - expected.mean(2, True)).square().sum()
        assert lost == pytest.approx(layer.fits["text_value"].found, abs=0.01), "packed again, with the basis that fits"
        assert lost < layer.refitted["text_value"].found
