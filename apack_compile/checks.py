"""Checks of what a user may ask for, and words of messages, shared by `optimize` and the backend."""

import math


def is_ratio(ratio: object) -> bool:
    """Whether something is a ratio that a plan can be asked for: a finite number > 1."""
    return isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and math.isfinite(ratio) and ratio > 1


def counted(number: int, noun: str) -> str:
    """A number and a noun whose plural ends in s: "1 layer", "1,024 layers"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(count: float) -> str:
    """Bytes for a reader: "1.5 kB", "35.1 MB"."""
    return (
        f"{count / 1e9:,.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:,.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:,.1f} kB"
    )
