"""Puts this folder, and the one with the small models, on the path; lm-eval reads and writes in a folder of the test, never the network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "models")]
