"""Bases that are fitted to what a layer stores, of all its streams at once, against float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers.cache_utils import DynamicCache

from apack_compile import AttentionPackOptions
from apack_compile.cache import fitted
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.kernels.heads import to_groups
from apack_compile.plan.presets.attentionpack import attentionpack_plan
from apack_compile.plan.source import PlanSource

HEADS, TOKENS, PICTURES, PADDING = 2, 203, 90, 7
ALIKE = dict.fromkeys(("vision_key", "vision_value", "text_key", "text_value"), 5)
UNLIKE = {"vision_key": 5, "vision_value": 3, "text_key": 4, "text_value": 6}


def stored(
    rows: int, ranks: dict[str, int], basis: str, dims: tuple[int, int], bits: int = 16, groups: int = 1
) -> tuple:
    """A layer of random tokens with few directions and means far from 0, the tokens, and which are vision and padding."""
    generator = torch.Generator().manual_seed(rows)
    plan = attentionpack_plan([0], ranks, 32, AttentionPackOptions(1.0, 1.0, bits=bits, basis=basis))
    plan = replace(plan, groups=groups)
    cache = CompactedCache([LayerKind(0, "full_attention", None)], DynamicCache(), PlanSource(given=plan))
    states = []
    for dim in dims:
        mixed = torch.randn(rows, TOKENS, 4, generator=generator) @ torch.randn(4, HEADS * dim, generator=generator)
        noise = 0.05 * torch.randn(rows, TOKENS, HEADS * dim, generator=generator)
        states.append((mixed + noise + 3).unflatten(-1, (HEADS, dim)).transpose(1, 2))
    vision, padding = torch.zeros(2, rows, TOKENS, dtype=torch.bool)
    for row in range(rows):
        padding[row, : PADDING * row] = True
        vision[row, 20 + row : 20 + row + PICTURES - 5 * row] = True
    cache.expect(vision, padding)
    cache.update(*states, 0)
    return cache.layers[0], states, vision, padding


def tokens_of(layer, segment: int, states: torch.Tensor, row: int, groups: int) -> torch.Tensor:
    """The tokens `[G, n, W_g]` of a row in a segment, float64."""
    positions = layer.positions()[segment][row]
    return to_groups(states[row : row + 1], groups)[0, :, positions[positions >= 0].long()].double()


@pytest.mark.parametrize("basis", ("sequence", "batch"))
@pytest.mark.parametrize("dims", ((8, 8), (8, 6)), ids=("alike", "other values"))
@pytest.mark.parametrize("ranks", (ALIKE, UNLIKE), ids=("one rank", "ranks"))
@pytest.mark.parametrize("width", (1024, 1), ids=("together", "one by one"))
@pytest.mark.parametrize("groups", (1, 2))
def test_each_basis_is_the_leading_eigenvectors_of_its_own_tokens(basis, dims, ranks, width, groups, monkeypatch):
    monkeypatch.setattr(fitted, "TOGETHER_WIDTH", width)
    rows = 3
    layer, states, _, _ = stored(rows, ranks, basis, dims, groups=groups)
    for segment, name in enumerate(("vision", "text"), 1):
        for stream, x in zip(("key", "value"), states, strict=True):
            found = getattr(layer.pairs[name], stream).basis
            each = [tokens_of(layer, segment, x, row, groups) for row in range(rows)]
            each = each if basis == "sequence" else [torch.cat(each, 1)]
            assert found.mean.shape[:2] == (len(each), groups)
            for i, group in product(range(len(each)), range(groups)):
                tokens = each[i][group]
                centered, rank = tokens - tokens.mean(0), ranks[f"{name}_{stream}"]
                best = torch.linalg.svd(centered, full_matrices=False)
                torch.testing.assert_close(found.mean[i, group].double(), tokens.mean(0), atol=2e-3, rtol=1e-3)
                decoder = found.decoder[i, group].double()
                assert decoder.shape[0] == rank
                left = (centered - centered @ decoder.mT @ decoder).square().sum()
                assert left <= best.S[rank:].square().sum() + 1e-5 * centered.square().sum()
                deviation = best.S[:rank] / len(tokens) ** 0.5
                torch.testing.assert_close(found.step[i, group].double(), deviation, atol=0, rtol=1e-2)


def test_streams_fitted_at_once_have_the_bits_of_those_fitted_one_by_one(monkeypatch):
    both = []
    for width in (1024, 1):
        monkeypatch.setattr(fitted, "TOGETHER_WIDTH", width)
        layer, _, _, _ = stored(3, ALIKE, "sequence", (8, 8), bits=4)
        both.append([x for pair in layer.pairs.values() for x in (*pair.tensors, *pair.key.basis, *pair.value.basis)])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
