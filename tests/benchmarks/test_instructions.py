"""Instructions of the compiled kernels, counted without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

COUNT = """
import json, torch
from instructions import described
with torch.no_grad():
    print(json.dumps([described("SmolLM2-135M", None, 0, 1), described("SmolLM2-135M", 8.0, 64, 1)]))
"""


def test_codes_cost_instructions_that_the_papers_plan_does_not(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=Path(__file__).parents[2] / "benchmarks",
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    paper, ratio = json.loads(done.stdout.splitlines()[-1])
    assert (paper["bands_key"], ratio["bands_key"], ratio["block"], ratio["warps"]) == ("64+0+0+0", "0+0+48+64", 64, 4)
    # a token's 224 codes, 32 of them at a time, take at least one instruction each
    assert ratio["instructions_per_token"] > 224 / 32
    assert ratio["instructions_per_token"] > 2 * paper["instructions_per_token"] > 0
    assert ratio["issue_us"] == pytest.approx(ratio["instructions_per_token"] * 32_768 * 16 / (132 * 4 * 1.8e3))
