"""Puts this folder on the path, for the models its tests share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
