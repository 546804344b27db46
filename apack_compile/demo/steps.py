"""Decode steps of two caches, timed in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from apack_compile.models.cache_argument import with_cache

# Steps of each side in a round; the first round warms up.
STEPS, ROUNDS = 3, 4


@dataclass
class Steps:
    """Greedy steps of a model, not compiled, one after the other, with a cache of so many rows."""

    model: Any
    cache: Any
    rows: int
    seconds: list[float] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> None:
        """A round."""
        token = torch.zeros(self.rows, 1, dtype=torch.long, device=self.model.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            logits = self.model(**with_cache(self.model, {"input_ids": token}, self.cache), use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        token.tolist()
        self.seconds.append((time.perf_counter() - start) / STEPS)


def seconds_in_turns(sides: dict[str, Steps]) -> dict[str, float]:
    """Median seconds of a step of each side."""
    for _ in range(ROUNDS):
        for side in sides.values():
            side.run()
    return {name: median(side.seconds[1:]) for name, side in sides.items()}
