"""Quality of the packed cache against the dense one.

`python benchmarks/quality.py --text`: SmolLM2-135M on a long English text that ships with Python (pydoc_data.topics). At each place
a prefix is prefilled once, exactly; its keys and values go into a packed cache, and the next tokens are scored in one chunk
over the dense and over the packed cache. Prints the mean KL divergence (nats a token) with the bytes held. Bases are calibrated on
other places of the text.
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from harness import Row, print_table, write_json
from torch import Tensor
from transformers.cache_utils import DynamicCache

import apack_compile
from apack_compile.demo.assets import load_model, load_tokenizer

PLACES = (2_000, 30_000, 45_000)
CALIBRATION_PLACES = (60_000, 75_000, 90_000)
CHUNK = 1_024


def prefill(model: torch.nn.Module, ids: Tensor) -> DynamicCache:
    """A dense cache of the tokens `[T]`."""
    cache = DynamicCache(config=model.config.get_text_config())
    for chunk in ids[None].split(CHUNK, dim=1):
        model(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
    return cache


def packed_copy(model: torch.nn.Module, dense: DynamicCache) -> apack_compile.CompactedCache:
    """A packed cache of what a dense one holds."""
    cache = apack_compile.new_cache(model, 8)
    for index, layer in enumerate(dense.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def log_probabilities(model: torch.nn.Module, ids: Tensor, cache: torch.nn.Module) -> Tensor:
    """Log-probabilities `[n, vocabulary]` after each of the tokens `[n]`."""
    return model(input_ids=ids[None], past_key_values=cache).logits[0].float().log_softmax(-1)


def text_rows(ratios: list[float], prefix: int, scored: int) -> list[Row]:
    """One row per ratio and place, and the mean over places."""
    model, tokenizer = load_model(), load_tokenizer()
    ids = torch.tensor(tokenizer("\n".join(topics.values())).input_ids)
    apack_compile.optimize(model, ratio=ratios[0], compile="none")
    length = prefix + scored
    apack_compile.calibrate(
        model, [{"input_ids": ids[None, start : start + length], "logits_to_keep": 1} for start in CALIBRATION_PLACES]
    )
    rows: list[Row] = []
    for place in PLACES:
        dense = prefill(model, ids[place : place + prefix])
        following = ids[place + prefix : place + length]
        packed = {}
        for ratio in ratios:
            apack_compile.optimize(model, ratio=ratio, compile="none")
            packed[ratio] = packed_copy(model, dense)
        reference = log_probabilities(model, following, dense)
        for ratio in ratios:
            held = packed[ratio].report()
            scores = log_probabilities(model, following, packed[ratio])
            kl = (reference.exp() * (reference - scores)).sum(-1).mean().item()
            agree = (reference.argmax(-1) == scores.argmax(-1)).float().mean().item()
            rows.append(
                {
                    "ratio": ratio,
                    "place": place,
                    "tokens": prefix,
                    "kl": kl,
                    "top1_equal": agree,
                    "held_ratio": held["ratio"],
                    "sequence_bytes": held["sequence_bytes"],
                    "model_bytes": held["model_bytes"],
                }
            )
    return rows


def mean_rows(rows: list[Row]) -> list[Row]:
    """Means over places, one row per ratio."""
    return [
        {
            "ratio": ratio,
            **{
                key: sum(row[key] for row in rows if row["ratio"] == ratio) / sum(row["ratio"] == ratio for row in rows)
                for key in ("kl", "top1_equal", "held_ratio")
            },
        }
        for ratio in dict.fromkeys(row["ratio"] for row in rows)
    ]


def main(
    text: Annotated[bool, typer.Option("--text", help="SmolLM2 on long text.")] = False,
    ratio: Annotated[list[float], typer.Option(help="Ratios to measure.")] = [4.0, 6.0, 8.0],  # noqa: B006
    prefix: Annotated[int, typer.Option(help="Tokens before the scored ones.")] = 6_144,
    scored: Annotated[int, typer.Option(help="Scored tokens.")] = 192,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """Measure the packed cache's quality."""
    if not text:
        raise typer.BadParameter("choose what to measure: --text")
    with torch.no_grad():
        rows = text_rows(ratio, prefix, scored)
    print_table("KL against the dense cache, by place", rows)
    print_table("mean over places", mean_rows(rows))
    if json is not None:
        write_json(json, rows)


if __name__ == "__main__":
    typer.run(main)
