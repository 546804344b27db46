"""What calibration and a first request cost: peak memory above the loaded model, and time, beside a dense prefill; and quality.

`python benchmarks/calibration.py --layers 8`: models of the shapes with random weights, each measured in a process of its own.
`--quality`: KL with bases of `calibrate` and of a first request, SmolLM2 on text and the demo's model on pictures.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attend import SHAPES
from calibration_quality import quality_rows
from harness import Row, print_table, write_json
from models import RANDOM_VOCABULARY, SIZES
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile

RATIO = 8.0
TOKENS = {"Qwen2.5-VL-7B": 4_096, "LLaVA-1.5-7B": 2_048, "SmolLM2-135M": 2_048, "Gemma3-4B": 4_096}
# As narrow as this, a prefill is little more than its attention: with a model's own a calibration weighs less beside it.
FEED_FORWARD = 1_024
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEGABYTE = 2**20


@dataclass(frozen=True)
class Case:
    """One thing to measure: `what` of "dense prefill", "first request" and "calibrate", with so many inputs."""

    shape: str
    what: str
    inputs: int
    layers: int
    tokens: int
    feed_forward: int
    device: str


def random_model(case: Case) -> nn.Module:
    """A Llama of a shape with random weights in bfloat16."""
    shape = SHAPES[case.shape]
    config = LlamaConfig(
        vocab_size=RANDOM_VOCABULARY,
        hidden_size=SIZES[case.shape][0],
        intermediate_size=case.feed_forward,
        num_hidden_layers=case.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2**17,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(case.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def resident(name: str) -> int:
    """A line of the process's status in bytes: VmRSS now, VmHWM the most since `forget_peak`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def run(case: Case) -> dict[str, Any]:
    """Seconds, peak bytes above the loaded model, and bytes of the shared bases, of one case."""
    torch.manual_seed(0)
    model = random_model(case)
    inputs = [torch.randint(0, RANDOM_VOCABULARY, (1, case.tokens), device=case.device) for _ in range(case.inputs)]
    one = inputs[0]
    with torch.no_grad():
        model(one[:, :32])
        if case.what != "dense prefill":
            apack_compile.optimize(model, ratio=RATIO, compile="none")
        on_gpu = case.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            CLEAR.write_text("5")
        before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
        start = time.perf_counter()
        if case.what == "dense prefill":
            kept = model(one, use_cache=True, logits_to_keep=1)
        elif case.what == "first request":
            kept = model.generate(one, max_new_tokens=1, return_dict_in_generate=True)
        else:
            kept = apack_compile.calibrate(model, [{"input_ids": ids} for ids in inputs])
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
        del kept
    bases = 0
    if case.what != "dense prefill":
        model.generate(one, max_new_tokens=1)
        bases = apack_compile.report(model).bytes["model_bytes"]
    return {"seconds": seconds, "peak": peak - before, "bases": bases}


def measured(case: Case) -> dict[str, Any]:
    """The same in a process of its own, which begins with no memory of others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run, case).result()


def rows_of(shape: str, layers: int, tokens: int, counts: list[int], feed_forward: int, device: str) -> list[Row]:
    """A shape's rows, the dense prefill first."""
    heads = SHAPES[shape]
    dense_cache = 2 * layers * tokens * heads.heads * heads.head_dim * 2
    cases = [("dense prefill", 1), ("first request", 1), *(("calibrate", count) for count in counts)]
    rows: list[Row] = []
    dense: dict[str, Any] = {}
    for what, inputs in cases:
        found = measured(Case(shape, what, inputs, layers, tokens, feed_forward, device))
        dense = dense or found
        rows.append(
            {
                "shape": shape,
                "what": what,
                "inputs": inputs,
                "tokens": tokens,
                "dense_cache_mb": dense_cache / MEGABYTE,
                "peak_mb": found["peak"] / MEGABYTE,
                "peak_of_dense_cache": found["peak"] / dense_cache,
                "peak_of_prefill": found["peak"] / dense["peak"],
                "seconds": found["seconds"],
                "prefills_an_input": found["seconds"] / dense["seconds"] / inputs,
                "bases_mb": found["bases"] / MEGABYTE,
            }
        )
    return rows


def main(
    shape: Annotated[list[str] | None, typer.Option(help="Shapes; all of them.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of each model.")] = 8,
    inputs: Annotated[list[int], typer.Option(help="Numbers of calibration inputs.")] = [1, 8],  # noqa: B006
    tokens: Annotated[int | None, typer.Option(help="Tokens of an input; as in the table.")] = None,
    feed_forward: Annotated[int, typer.Option(help="Width of the feed-forward part.")] = FEED_FORWARD,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quality: Annotated[bool, typer.Option("--quality", help="KL of both ways instead.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure calibration and a first request."""
    rows = quality_rows() if quality else []
    if quality:
        print_table("KL against the dense cache", rows)
    for name in [] if quality else shape or SHAPES:
        found = rows_of(name, layers, tokens or TOKENS[name], inputs, feed_forward, device)
        print_table(name, found)
        rows += found
    if json_path is not None:
        write_json(json_path, rows, {"layers": layers, "feed_forward": feed_forward, "ratio": RATIO})


if __name__ == "__main__":
    typer.run(main)
