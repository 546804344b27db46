"""The example of docs/guides/export.md runs as it stands: each of its parts in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "export.md"


def test_the_example_runs_in_two_processes(tmp_path: Path):
    scripts = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(scripts) == 2
    outputs = []
    for script in scripts:
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "2 caches packed, 0 dense" in outputs[0]
    assert (tmp_path / "packed.pt2").is_file()
