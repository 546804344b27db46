"""Puts tests/graphs on the path; not tests/, whose folders have the names of packages."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "graphs"))
