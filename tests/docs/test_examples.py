"""The examples of the README and of the manual run as they stand, each page in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
# "auto" compiles with Inductor where there is a C++ compiler, which takes most of a page's time.
NO_COMPILER = {"CXX": "no-such-compiler"}
NEWEST_NAMES = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="runs in a checkout only"),
]


def run(page: str, folder: Path, **environment: str) -> str:
    """What the Python blocks of a page print, run one after the other."""
    pytest.importorskip("PIL")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reached(printed: str) -> float:
    """The compression ratio in a printed report."""
    return float(re.search(r"packed \(([\d.]+)x\)", printed)[1])


def worded(text: str, start: str) -> str:
    """The line that begins so, without its numbers and what depends on the machine."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return re.sub(r"[\d.,]+|\(auto: .*\)", "", line).rstrip()


def test_the_readme_packs_and_reaches_its_ratio(user_folder):
    printed = run("README.md", user_folder)
    assert printed.count("full_attention       rewritten") == 2
    assert reached(printed) >= 4
    shown = (ROOT / "docs" / "reference" / "report.md").read_text()
    for start in (
        "apack-compile: ratio",
        "bases calibrated",
        "packed keys",
        "layer  kind",
        "    0  full",
        "last cache",
    ):
        assert worded(shown, start) == worded(printed, start)


def test_get_started_saves_a_plan_and_loads_it(user_folder):
    printed = run("docs/index.md", user_folder, **NO_COMPILER)
    assert reached(printed) >= 4
    assert (user_folder / "plan.safetensors").stat().st_size > 10_000


@pytest.mark.skipif(not NEWEST_NAMES, reason="before transformers 5.24 the argument has another name")
def test_many_questions_are_asked_from_one_packed_prompt(user_folder):
    assert len(run("docs/guides/one_prompt.md", user_folder, **NO_COMPILER).splitlines()) == 2
