"""Operations that packing a prompt takes in each layer on CUDA, and where the host waits for the device."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from operations import Counts, counted
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="what is launched on CUDA is counted")

import apack_compile
from apack_compile import AttentionPackConfig

IMAGE, FEW, MANY = 9, 2, 4
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}
FEW_COMPONENTS = dict.fromkeys(("vision_key", "vision_value", "text_key", "text_value"), 8)
# A layer's operations above those of a dense prefill, launches of Triton's kernels among them.
MOST = 80


@dataclass(frozen=True)
class Case:
    """A prompt, and how it is packed."""

    setting: dict[str, Any]
    tokens: int = 300
    rows: int = 1
    pictures: int = 0
    padded: bool = False
    most: int = MOST


CASES = {
    "text": Case({"ratio": 4}, most=25),
    "pictures": Case({"ratio": 4}, pictures=120, most=35),
    "coarse text": Case({"ratio": 6, "coarse": ("text",)}, tokens=1100, pictures=200),
    "coarse pictures": Case({"ratio": 6, "coarse": ("vision",)}, tokens=1100, pictures=800),
    "padded rows": Case({"ratio": 4}, rows=3, pictures=120, padded=True, most=42),
    "attentionpack": Case({"preset": "attentionpack"}, pictures=120, most=55),
    "attentionpack, padded rows": Case({"preset": "attentionpack"}, rows=3, pictures=120, padded=True, most=62),
    # bases of four streams: their sums, an eigendecomposition, and their float16 numbers
    "attentionpack, fitted": Case({"preset": "attentionpack", "ranks": FEW_COMPONENTS}, pictures=120, most=91),
    "attentionpack, fitted, padded rows": Case(
        {"preset": "attentionpack", "ranks": FEW_COMPONENTS}, rows=3, pictures=120, padded=True, most=118
    ),
    "a-vl": Case({"preset": "a-vl"}, pictures=120, most=66),
    "a-vl, padded rows": Case({"preset": "a-vl"}, rows=3, pictures=120, padded=True),
    # pictures and text compete for one budget, so that only the device knows how many of each stay
    "snapkv": Case({"preset": "snapkv"}, pictures=120, most=188),
    "snapkv, padded rows": Case({"preset": "snapkv"}, rows=3, pictures=120, padded=True, most=200),
}


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, num_hidden_layers=layers, max_position_embeddings=2048)
    model = LlamaForCausalLM(config).eval()
    model.config.image_token_id = IMAGE
    return model.bfloat16()


def prompt_of(case: Case) -> dict[str, Tensor]:
    """Random text around placeholders; each row has seven tokens of padding more than the one before."""
    ids = torch.randint(10, 64, (case.rows, case.tokens), generator=torch.Generator().manual_seed(9))
    ids[:, 20 : 20 + case.pictures] = IMAGE
    mask = torch.ones_like(ids)
    for row in range(case.rows if case.padded else 0):
        mask[row, : 7 * row] = 0
        ids[row, 20 : 20 + 7 * row] = 11
    return {"input_ids": ids, "attention_mask": mask}


def counts_of(case: Case, layers: int) -> tuple[Counts, Counts, Counts]:
    """Of a dense prefill, a packed one, and the eager step behind it."""
    model, inputs = model_of(layers), prompt_of(case)
    with torch.no_grad():
        with counted() as dense:
            model(**inputs, past_key_values=DynamicCache(config=model.config))
        apack_compile.optimize(model, AttentionPackConfig(**case.setting, compile="none", min_tokens=0))
        if "ratio" in case.setting:
            apack_compile.calibrate(model, inputs)
        # makes the plan, which later prompts share
        model(**inputs, past_key_values=apack_compile.new_cache(model, 16))
        cache = apack_compile.new_cache(model, 16)
        with counted() as packed:
            model(**inputs, past_key_values=cache)
        assert not cache.notes, "no basis is refitted, which takes more"
        mask = torch.ones(case.rows, case.tokens + 1, dtype=torch.int64)
        mask[:, :-1] = inputs["attention_mask"]
        with counted() as step:
            model(input_ids=torch.full((case.rows, 1), 12), attention_mask=mask, past_key_values=cache)
    return dense, packed, step


def in_a_layer(few: Counter, many: Counter) -> dict[Any, float]:
    """What a layer adds."""
    found = {name: (many[name] - few[name]) / (MANY - FEW) for name in many}
    return {name: count for name, count in found.items() if count > 0}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_a_prompt_takes_few_operations_and_nobody_waits_in_it(name):
    case = CASES[name]
    few, many = counts_of(case, FEW), counts_of(case, MANY)
    dense, packed, _ = ((b.total - a.total) / (MANY - FEW) for a, b in zip(few, many, strict=True))
    assert packed - dense <= case.most, in_a_layer(few[1].places, many[1].places)
    for which in (1, 2):
        waits = in_a_layer(few[which].waits, many[which].waits)
        assert not waits, "the host waits in a layer"
    own = {what: count for what, count in many[1].waits.items() if what[1]}
    assert 0 < sum(own.values()) <= 4, own
