"""The examples of the documentation run."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def snippet(name: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    return found


def test_one_basis_misses_less_of_keys_that_are_nearer_to_unrotated_ones(capsys):
    names: dict = {}
    exec(snippet("relative_keys.md"), names)
    missed = names["missed"]
    assert missed[1] < missed[16] < missed[64] < missed[0]
    assert "rotated back to the start of their 1 slots" in capsys.readouterr().out
    shown = re.findall(r"key_block=(\d+): 12 of 48 components miss ([\d.]+)%", (DOCS / "relative_keys.md").read_text())
    assert {int(block): pytest.approx(float(share) / 100, abs=0.01) for block, share in shown} == missed
