"""AttentionPack's table of compression ratios (arXiv 2603.23914), recomputed from the bytes that our cache really holds.

`python benchmarks/paper.py`: LLaVA-1.5-7B's shape (32 layers, 32 heads x 128), a picture of 576 tokens and 50 text tokens, random keys and
values. Every layer holds the same bytes, so one is built. "paper's terms" counts what the paper's formula counts: coefficients, bases
and dense text. "all held" adds what we also keep: means, steps, positions, and the empty tail for tokens to come.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import Row, print_table, write_json
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from apack_compile.cache.accounting import storage_bytes
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.plan.presets.attentionpack import attentionpack_plan
from apack_compile.plan.source import PlanSource

HEADS, HEAD_DIM = 32, 128
VISION_TOKENS, TEXT_TOKENS = 576, 50
TAIL_SLOTS = 32
# Ranks of vision keys and values, and the ratio that the paper reports.
PUBLISHED = {(64, 128): 3.92, (64, 64): 5.09, (32, 64): 5.98, (32, 32): 7.24, (16, 16): 9.18}


def filled_cache(key_rank: int, value_rank: int) -> CompactedCache:
    """One layer's cache of the prompt, in bfloat16."""
    ranks = {"vision_key": key_rank, "vision_value": value_rank, "text_key": 128, "text_value": 128}
    plan = attentionpack_plan([0], ranks, TAIL_SLOTS)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=HEADS, hidden_size=HEADS * HEAD_DIM)
    cache = CompactedCache([LayerKind(0, "full_attention", None)], DynamicCache(config=config), PlanSource(given=plan))
    tokens = VISION_TOKENS + TEXT_TOKENS
    vision = torch.zeros(1, tokens, dtype=torch.bool)
    vision[:, TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + VISION_TOKENS] = True
    cache.expect(vision, None)
    key, value = torch.randn(2, 1, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache.update(key, value, 0)
    return cache


def row(key_rank: int, value_rank: int, published: float) -> Row:
    """Bytes and ratios of one line of the table."""
    cache = filled_cache(key_rank, value_rank)
    layer, held = cache.packed_layers[0], cache.report()
    decoders = [stream.basis.decoder for pair in layer.pairs.values() for stream in pair.streams]
    paper_bytes = storage_bytes([layer.first.key, layer.first.value, *layer.packed_tensors(), *decoders])
    ratio = held["dense_bytes"] / paper_bytes
    return {
        "rank_key": key_rank,
        "rank_value": value_rank,
        "published": published,
        "paper_terms": ratio,
        "off_percent": 100 * (ratio / published - 1),
        "all_held": held["ratio"],
        "bytes_per_layer": paper_bytes,
    }


def main(json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None) -> None:
    """Recompute the table."""
    with torch.no_grad():
        rows = [row(*ranks, published) for ranks, published in PUBLISHED.items()]
    print_table("LLaVA-1.5-7B, 576 vision and 50 text tokens", rows)
    if json is not None:
        write_json(json, rows)


if __name__ == "__main__":
    typer.run(main)
