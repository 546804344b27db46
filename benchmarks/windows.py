"""Bytes that a cache with sliding windows holds, at the shape of Gemma3-4B: `python benchmarks/windows.py`.

Random keys and values whose spectra fall, a layer of each kind, bfloat16, batch 1; bytes do not depend on what the tokens are.
"""

import argparse

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.kernels.heads import to_groups
from apack_compile.plan.basis import fit, fit_steps, moments
from apack_compile.plan.budget import StreamStatistics, budget_key, budget_plan
from apack_compile.plan.ring import block_for
from apack_compile.plan.rotation import BLOCK, KeyRotation
from apack_compile.plan.source import PlanSource

HEADS, HEAD_DIM, WINDOW = 4, 256, 1024
# Of 34 layers every sixth sees all tokens.
LAYERS = {None: 5, WINDOW: 29}
CHUNK = 4_096


def states(tokens: int, seed: int) -> Tensor:
    """Keys or values `[1, H_kv, tokens, D]` whose components fall by two orders of magnitude, those that rotate together alike."""
    generator = torch.Generator().manual_seed(seed)
    scale = (
        torch.logspace(0, -2, HEADS * HEAD_DIM // 2).view(HEADS, 1, 1, -1).expand(-1, -1, 2, -1).reshape(HEADS, 1, -1)
    )
    return (torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator) * scale).bfloat16()


def statistics(seed: int) -> StreamStatistics:
    """What a calibration on such states finds."""
    x = to_groups(states(2 * HEADS * HEAD_DIM, seed).float(), 1)
    spectrum = fit_steps(fit(moments(x)), x, token_scale=True)
    variance = spectrum.deviation[0].square()
    return StreamStatistics(spectrum, variance / variance.sum())


def held_bytes(ratio: float, tokens: int, streams: dict) -> dict[int | None, tuple[int, int]]:
    """Dense and packed bytes of one layer by window."""
    found = {}
    for window in LAYERS:
        block = BLOCK if window is None else block_for(window, BLOCK)
        rotation = KeyRotation(10_000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)), block)
        key = budget_key(tokens, 0.0) if window is None else (min(tokens, window), 0.0)
        source = PlanSource(given=budget_plan(streams, ratio, *key, rotation=rotation, window=window))
        cache = CompactedCache([LayerKind(0, "attention", None, window=window)], DynamicCache(), source)
        cache.groups.choose_plans(*[torch.zeros(1, tokens, dtype=torch.bool)] * 2)
        for start in range(0, tokens, CHUNK):
            chunk = min(CHUNK, tokens - start)
            cache.update(states(chunk, start), states(chunk, start + 1), 0)
        if cache.notes:
            raise RuntimeError("; ".join(cache.notes))
        report = cache.report()
        found[window] = report["dense_bytes"], report["sequence_bytes"]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_096, 32_768])
    parser.add_argument("--ratio", type=float, nargs="+", default=[4.0, 8.0])
    options = parser.parse_args()
    streams = {0: {"text": (statistics(0), statistics(1))}}
    print("| tokens | ratio | dense | windows dense | windows packed | full layers | windows |")
    print("|---|---|---|---|---|---|---|")
    for tokens in options.tokens:
        for ratio in options.ratio:
            found = held_bytes(ratio, tokens, streams)
            dense = sum(LAYERS[window] * of[0] for window, of in found.items())
            packed = sum(LAYERS[window] * of[1] for window, of in found.items())
            before = LAYERS[None] * found[None][1] + LAYERS[WINDOW] * found[WINDOW][0]
            each = " | ".join(f"{found[window][0] / found[window][1]:.2f}" for window in LAYERS)
            print(
                f"| {tokens:,} | {ratio:g} | {dense / 1e6:.0f} MB | {dense / before:.2f} | {dense / packed:.2f} | {each} |"
            )


if __name__ == "__main__":
    main()
