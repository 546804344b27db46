"""The example of docs/guides/own_cache.md runs as it stands there."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "own_cache.md"


def test_the_example_packs_its_buffers(capsys):
    torch._dynamo.reset()
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})
    assert "packed buffers: 1 layer of 512 slots, 310 tokens held" in capsys.readouterr().out
