"""Statistics of the keys and values that a program writes into its caches, from calls with calibration inputs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from apack_compile.calibration import Running, RunningMoments, Statistics, by_layer
from apack_compile.codec import FLOAT16_MAX
from apack_compile.export.find import OwnedCache
from apack_compile.export.rewrite import new_tokens
from apack_compile.kernels.layout import to_groups
from apack_compile.plan import FIRST_TOKENS, STREAMS

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Observer(nn.Module):
    """Takes moments of what one cache is given."""

    def __init__(self, number: int, name: str, running: Running) -> None:
        super().__init__()
        self.number, self.name, self.running = number, name, running

    def forward(self, key: Tensor, value: Tensor, index: Tensor) -> None:
        """Add the tokens `[B, H_kv, n, D]` at positions `index` `[n]`, but for the first of a sequence."""
        later = index >= FIRST_TOKENS
        for stream, states in enumerate((key, value)):
            largest = states.detach().abs().amax() if states.numel() else torch.zeros(())
            if not largest <= FLOAT16_MAX:
                raise ValueError(
                    f"calibration_inputs: {STREAMS[stream]} states of {self.name} reach {float(largest):.3g}, past float16's "
                    f"{FLOAT16_MAX:.0f}"
                )
            tokens = to_groups(states.detach()[:, :, later], 1).transpose(0, 1).flatten(1, 2)
            if tokens.shape[1]:
                self.running.setdefault((self.number, "text", stream), RunningMoments()).add(tokens)


def calls_of(inputs: Any) -> list[Call]:
    """Calibration inputs as calls: one call or a list of them, each a tuple of arguments or a dictionary of named ones."""
    given = list(inputs) if isinstance(inputs, list) else [inputs]
    calls: list[Call] = []
    for call in given:
        if isinstance(call, Mapping):
            calls.append(((), dict(call)))
        elif isinstance(call, tuple):
            calls.append((call, {}))
        else:
            raise ValueError(
                f"calibration_inputs: {type(call).__name__} must be a tuple of arguments or a dictionary of named ones, or a list of such"
            )
    if not calls:
        raise ValueError("calibration_inputs: an empty list holds no call")
    return calls


def observe(gm: fx.GraphModule, caches: Sequence[OwnedCache], calls: Iterable[Call]) -> Statistics:
    """Statistics of each cache by number; `gm` is changed and its state used. Raises ValueError where a cache saw no usable token."""
    running: Running = {}
    for cache in caches:
        gm.add_module(f"observer_{cache.number}", Observer(cache.number, cache.name, running))
        with gm.graph.inserting_after(cache.last):
            see = gm.graph.call_module(f"observer_{cache.number}")
        with gm.graph.inserting_before(see):
            see.args = new_tokens(gm.graph, cache)
    gm.recompile()
    with torch.no_grad():
        for args, kwargs in calls:
            gm(*args, **kwargs)
    for cache in caches:
        if (cache.number, "text", 0) not in running:
            raise ValueError(
                f"calibration_inputs: {cache.name} saw no token past the first {FIRST_TOKENS}; pass longer or more calls"
            )
    return by_layer(running)
