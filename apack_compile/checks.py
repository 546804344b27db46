"""Checks of what a user may ask for, shared by `optimize` and the backend."""

import math


def is_ratio(ratio: object) -> bool:
    """Whether something is a ratio that a plan can be asked for: a finite number > 1."""
    return isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and math.isfinite(ratio) and ratio > 1
