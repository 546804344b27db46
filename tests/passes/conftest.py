"""Puts tests/graphs on the path: pytest's importlib mode does not, and tests/ itself holds folders named like packages."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "graphs"))
