"""A shared basis that does not fit a prompt is noticed and refitted."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.kernels.format import StreamBasis
from apack_compile.plan.basis import fit, fit_steps, moments
from apack_compile.plan.budget import StreamStatistics, budget_plan
from apack_compile.plan.source import PlanSource

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


def states(kind: int, tokens: int, seed: int) -> torch.Tensor:
    """Tokens `[1, H, T, D]` of one of two kinds of text: their variances lie in other directions."""
    generator = torch.Generator().manual_seed(100 + kind)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.7 ** torch.arange(WIDTH)
    return (x @ rotation + kind).view(1, tokens, HEADS, HEAD_DIM).transpose(1, 2)


@pytest.fixture(scope="module")
def plan():
    """Calibrated on the first kind."""
    sample = states(0, 3000, 0).transpose(1, 2).reshape(1, 1, 3000, WIDTH)
    spectrum = fit_steps(fit(moments(sample)), sample, token_scale=True)
    variance = spectrum.deviation[0].square()
    one = StreamStatistics(spectrum, variance / variance.sum())
    return budget_plan({0: {"text": (one, one)}}, 4.0, 600, 0.0)


def filled(plan, kind, tokens=600):
    cache = CompactedCache([LayerKind(0, "full_attention", None)], DynamicCache(), PlanSource(given=plan))
    key, value = states(kind, tokens, 7), states(kind, tokens, 8)
    cache.update(key, value, 0)
    layer = cache.layers[0]
    none = key[:, :, :0]
    unpacked = torch.ops.apack.unpack(none, none, *layer.state().flatten(), tokens)
    errors = [
        float((got - x).square().sum() / (x - x.mean(2, True)).square().sum())
        for got, x in zip(unpacked, (key, value), strict=True)
    ]
    return cache, errors


def test_tokens_like_the_calibration_keep_the_shared_basis(plan):
    cache, errors = filled(plan, 0)
    layer = cache.layers[0]
    assert cache.notes == [] and layer.refitted == {}
    assert layer.pairs["text"].key.basis.decoder.data_ptr() == plan.bases[0][2].decoder.data_ptr()
    report = cache.report()
    assert report["captured"] == pytest.approx(1 - max(errors), abs=0.02)


def test_other_tokens_are_refitted_and_pay_for_it(plan, monkeypatch):
    cache, errors = filled(plan, 1)
    layer = cache.layers[0]
    assert "2 of 4 shared bases did not fit" in cache.notes[0]
    assert set(layer.refitted) == {"text_key", "text_value"} and all(fit.is_bad for fit in layer.refitted.values())
    assert not torch.equal(layer.pairs["text"].key.basis.decoder, plan.bases[0][2].decoder)
    like, _ = filled(plan, 0)
    assert (
        cache.report()["sequence_bytes"]
        > like.report()["sequence_bytes"] + 2 * layer.pairs["text"].key.basis.decoder.nbytes
    )
    assert max(errors) < 3 * max(fit.expected for fit in layer.fits.values())
    monkeypatch.setattr("apack_compile.cache.drift.refit", lambda *args: StreamBasis(*plan.bases[0][2]))
    unhelped, worse = filled(plan, 1)
    assert min(worse) > 3 * max(errors)
    assert "lose more than their calibration promised" in unhelped.notes[-1]


def test_few_tokens_are_not_judged(plan):
    cache, _ = filled(plan, 1, tokens=20)
    assert cache.layers[0].fits == {}
