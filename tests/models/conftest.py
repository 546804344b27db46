"""Puts this folder on the path, for its model builders."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
