"""The kernels compile for a Hopper GPU, without one: what Triton's interpreter cannot tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

ROOT = Path(__file__).parents[2]
# Shared memory that a Hopper block may have, bytes.
MAX_SHARED = 232448
ATTEND = {"merge_kernel", "attend_kernel"}
LATENT = {"project_kernel", "expand_kernel"}
EXPECTED = {
    "four widths": ATTEND | LATENT,
    "rank 64 with tiers": ATTEND | LATENT | {"importance_kernel"},
    "one head a group": ATTEND | LATENT,
    "kept as it is": ATTEND,
    "wide heads": ATTEND | LATENT,
    "relative keys": ATTEND | LATENT,
    "relative keys, few rows": ATTEND | LATENT,
    "one segment, relative keys": ATTEND | LATENT,
    "three segments": ATTEND | LATENT,
    "three segments, relative keys": ATTEND | LATENT,
    "append": {"project_kernel", "write_kernel", "quantize_kernel"},
    "pack": {"project_kernel", "write_kernel", "lost_kernel", "share_kernel"},
    "append relative keys": {"project_kernel", "write_kernel", "quantize_kernel"},
}


@pytest.mark.parametrize("case", EXPECTED)
def test_kernels_compile_for_hopper_use_its_matrix_unit_and_spill_little(case, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(str(ROOT / folder) for folder in ("tests/support", "benchmarks"))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cuda_compiler", case],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == EXPECTED[case]
    for kernel in kernels:
        assert kernel["shared"] <= MAX_SHARED
        # bytes a thread spills: one kernel of all segments has more addresses to hold than registers, but not many more
        assert kernel["stack"] <= 256, kernel
        if kernel["name"] == "attend_kernel":
            assert kernel["matrix"] > 0
