"""Statistics of the keys and values that a program writes into its caches, from calls with calibration inputs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from apack_compile.calibration.streams import Running, RunningMoments, by_layer, fitted
from apack_compile.kernels.format import FLOAT16_MAX
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.rotations import rotated
from apack_compile.models.coordinates import rotary_frequencies
from apack_compile.passes.buffers.packed_state import new_tokens, positions
from apack_compile.passes.buffers.pairs import BufferPair
from apack_compile.passes.graph.nodes import value_of
from apack_compile.plan.choice import PackedLayers, Weights, alike, head_groups_for
from apack_compile.plan.plan import FIRST_TOKENS, STREAMS
from apack_compile.plan.rotation import BLOCK, KeyRotation, deinterleaved_keys, rotations_at
from apack_compile.plan.source import Statistics

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Observed:
    """Statistics of each cache by number, of keys rotated back by `rotation`; bytes that the bases of a cache may have, None for any."""

    statistics: Statistics
    rotation: KeyRotation | None
    basis_limit: int | None


class Observer(nn.Module):
    """Takes moments of what one cache is given: of keys as they come, and rotated back in each of the ways there are."""

    def __init__(self, number: int, name: str, groups: int, running: dict[KeyRotation | None, Running]) -> None:
        super().__init__()
        self.number, self.name, self.groups, self.running = number, name, groups, running

    def forward(self, key: Tensor, value: Tensor, index: Tensor) -> None:
        """Add the tokens `[B, H_kv, n, D]` at positions `index` `[n]`, but for the first of a sequence."""
        for name, states in zip(STREAMS, (key, value), strict=True):
            largest = states.abs().amax() if states.numel() else torch.zeros(())
            if not largest <= FLOAT16_MAX:
                raise ValueError(
                    f"calibration_inputs: {name} states of {self.name} reach {float(largest):.3g}, past float16's "
                    f"{FLOAT16_MAX:.0f}"
                )
        later = index >= FIRST_TOKENS
        key, value, index = key[:, :, later], value[:, :, later], index[later]
        for rotation, running in self.running.items() if len(index) else ():
            still = key
            if rotation is not None:
                rotations = rotations_at(index // rotation.block * rotation.block, rotation.frequencies)
                halves = deinterleaved_keys(key.to(torch.promote_types(key.dtype, torch.float32)), rotation)
                still = rotated(halves, rotations, back=True)
            for stream, states in enumerate((still, value)):
                tokens = to_groups(states, self.groups).transpose(0, 1).flatten(1, 2)
                running.setdefault((self.number, "text", stream), RunningMoments()).add(tokens)


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


def observe(gm: fx.GraphModule, caches: Sequence[BufferPair], calls: Iterable[Call], ratio: float) -> Observed:
    """Statistics of the caches, for plans of a ratio; `gm` is changed and its state used.

    Raises ValueError where a cache saw no usable token. Keys are rotated back by the frequencies of one of the program's buffers where
    that leaves them fewer bits to code. Wrong ones would cost quality, never correctness.
    """
    running: dict[KeyRotation | None, Running] = {None: {}, **{rotation: {} for rotation in key_rotations(gm, caches)}}
    weights = Weights.of(gm.parameters())
    groups = head_groups(caches, ratio, BLOCK if len(running) > 1 else 0, weights)
    for cache in caches:
        gm.add_module(f"observer_{cache.number}", Observer(cache.number, cache.name, groups, running))
        with gm.graph.inserting_after(cache.node):
            see = gm.graph.call_module(f"observer_{cache.number}")
        with gm.graph.inserting_before(see):
            key, value = new_tokens(gm.graph, cache)
            see.args = (key, value, positions(gm.graph, cache.key, key))
    gm.recompile()
    with torch.no_grad():
        for args, kwargs in calls:
            gm(*args, **kwargs)
    for cache in caches:
        if (cache.number, "text", 0) not in running[None]:
            raise ValueError(
                f"calibration_inputs: {cache.name} saw no token past the first {FIRST_TOKENS}; pass longer or more calls"
            )
    found = {rotation: by_layer(fitted(sums)) for rotation, sums in running.items()}
    best = min(found, key=lambda rotation: key_bits(found[rotation]))
    return Observed(found[best], best, None if weights is None else weights.limit // len(caches))


def head_groups(caches: Sequence[BufferPair], ratio: float, key_block: int, weights: Weights | None) -> int:
    """How many groups of heads share bases; a cache does not say how many query heads read it: as many as KV heads."""
    key = value_of(caches[0].key.state)
    layers = alike(PackedLayers(heads, heads, head_dim) for _, heads, _, head_dim in (c.key.size for c in caches))
    return head_groups_for(layers, key.dtype, ratio, key_block, key.device.type, weights).count


def key_rotations(gm: fx.GraphModule, caches: Sequence[BufferPair]) -> list[KeyRotation]:
    """Ways to rotate keys back: by each buffer of rotary frequencies, in either pairs."""
    width = min(cache.key.size[3] for cache in caches)
    known = (frequencies.float() for frequencies in rotary_frequencies(gm).values())
    fitting = [frequencies for frequencies in known if 2 * len(frequencies) <= width]
    return [
        KeyRotation(frequencies, BLOCK, interleaved=interleaved)
        for frequencies in fitting
        for interleaved in (False, True)
    ]


def key_bits(statistics: Statistics) -> float:
    """Bits that all keys need for a given error, up to a constant: the logarithms of their components' deviations."""
    return sum(float(layer["text"][0].spectrum.deviation.double().log2().sum()) for layer in statistics.values())
