"""How the keys of a model rotate with their position, seen in keys of one repeated token."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.cache_utils import DynamicCache

from apack_compile.calibration.sensitivity import pictures_beside
from apack_compile.kernels.rotations import rotated
from apack_compile.models.cache_argument import with_cache
from apack_compile.models.coordinates import owner_of, replaced_positions, rotary_frequencies, seen_positions
from apack_compile.models.uncompiled import uncompiled
from apack_compile.plan.ranks import all_agree
from apack_compile.plan.rotation import MAX_COORDINATES, KeyRotation, deinterleaved_keys, rotations_at

PROBE_TOKENS = 32
# Largest relative difference of keys that are the same key rotated; rounding to bfloat16 over many layers stays below.
TURN_TOLERANCE = 0.05
# Where a model does not say how long its sequences can be.
FARTHEST = 4_096


def find_rotation(
    model: nn.Module, layers: Iterable[int], batch: Mapping[str, Any], block: int
) -> tuple[KeyRotation | None, str]:
    """How the keys of these layers rotate, or None; and why.

    Each attention is given one hidden state, repeated, so its keys differ by their rotation alone, whatever the layers before do.
    The frequencies are those of the model's own buffers that explain it in every layer.
    """
    if block == 0:
        return None, "stored as they are: key_block=0"
    known = rotary_frequencies(model)
    if not known:
        return None, "stored as they are: the model has no rotary frequencies"
    layers = list(layers)
    with seen_positions(model) as seen:
        keys = keys_of_one_token(model, layers, batch)
    given = dict(seen)
    used = {name: frequencies for name, frequencies in known.items() if owner_of(model, name) in given}
    # an embedding that was not called, as a vision tower's, may have the same frequencies
    known = used or known
    ways = [
        (name, KeyRotation(frequencies.float().clone(), block, interleaved=interleaved))
        for name, frequencies in known.items()
        for interleaved in (False, True)
    ]
    errors = [
        rotating_error([deinterleaved_keys(k, rotation) for k in keys], rotation.frequencies) for _, rotation in ways
    ]
    name, rotation = ways[errors.index(min(errors))]
    rotates = min(errors) < TURN_TOLERANCE
    # how many forward passes follow depends on it
    if not all_agree(model, rotates):
        if rotates:
            return None, f"stored as they are: those of another rank do not rotate by {name} alone"
        if rotating_error(keys, torch.zeros(1)) < TURN_TOLERANCE:
            return None, "stored as they are: they do not rotate with their position"
        return None, f"stored as they are: they do not rotate by {name} alone (relative difference {min(errors):.2g})"
    pairs = " in interleaved pairs" if rotation.interleaved else ""
    said = f"rotated back to the start of their {block} slots, by {name}{pairs}"
    rotary = owner_of(model, name)
    count = given[rotary].shape[0] if rotary in given and given[rotary].dim() == 3 else 1
    if count == 1:
        return rotation, said
    if count > MAX_COORDINATES:
        return None, f"stored as they are: positions have {count} coordinates"
    probes = keys_by_coordinate(model, rotary, layers, batch, count)
    probes = [(places, [deinterleaved_keys(k, rotation) for k in keys]) for places, keys in probes]
    firsts, seconds, error = coordinates_of_pairs(probes, rotation.frequencies)
    if not error < TURN_TOLERANCE:
        return None, (
            f"stored as they are: positions have {count} coordinates, and pairs do not rotate by one of them each "
            f"(relative difference {error:.2g})"
        )
    said = f"{said}, each pair by one of {count} coordinates"
    if not torch.equal(firsts, seconds):
        said += ": that of its first component, the other has another (no difference in text)"
    return replace(rotation, coordinates=firsts), said


Probes = list[tuple[Tensor, list[Tensor]]]


def keys_by_coordinate(
    model: nn.Module, rotary: nn.Module, layers: list[int], batch: Mapping[str, Any], count: int
) -> Probes:
    """For each coordinate: where a repeated token was put `[T]`, at 0 in the other coordinates, and its keys per layer."""
    # powers of two: far enough apart for slow pairs, and their float32 angles are exact
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or FARTHEST
    places = 2 ** (torch.arange(PROBE_TOKENS) % max(longest.bit_length() - 1, 1))
    places[0] = 0
    probes = []
    for coordinate in range(count):
        positions = torch.zeros(count, 1, PROBE_TOKENS, dtype=torch.int64)
        positions[coordinate] = places
        with replaced_positions(rotary, positions):
            probes.append((places, keys_of_one_token(model, layers, batch)))
    return probes


def coordinates_of_pairs(probes: Probes, frequencies: Tensor) -> tuple[Tensor, Tensor, float]:
    """The coordinates `[P]` that each pair's first and second component rotate by, int64, and the largest error that they leave."""
    each = [pair_errors(keys, frequencies, places) for places, keys in probes]
    ways = list(product(range(len(probes)), repeat=2))
    errors = torch.stack(
        [torch.stack([e[int(f == i), int(s == i)] for i, e in enumerate(each)]).amax(0) for f, s in ways]
    )
    least, found = errors.min(0)
    firsts, seconds = torch.tensor(ways)[found].to(frequencies.device).unbind(-1)
    return firsts.contiguous(), seconds.contiguous(), float(least.max())


def pair_errors(keys: list[Tensor], frequencies: Tensor, places: Tensor) -> Tensor:
    """How far keys are from the first one with a pair's components rotated or not `[first rotated, second rotated, P]`.

    Largest over layers, relative to a layer's longest key. How long a pair is does not count: it may be normalised after it was rotated.
    """
    pairs = len(frequencies)
    cos, sin = rotations_at(places.to(frequencies.device), frequencies).unbind(-2)
    errors = []
    for k in keys:
        x = k.float()[..., : 2 * pairs].unflatten(-1, (2, pairs))
        a, b = x[:, :1].unbind(-2)
        firsts, seconds = (a.expand_as(x[..., 0, :]), a * cos - b * sin), (b.expand_as(x[..., 0, :]), b * cos + a * sin)
        length = x[:, :1].norm(dim=-2) / k.float().norm(dim=-1).amax().clamp_min(1e-12)
        expected = torch.stack([torch.stack([torch.stack([f, s], -2) for s in seconds]) for f in firsts])
        moved = normalize(x, dim=-2) - normalize(expected, dim=-2)
        errors.append((moved.norm(dim=-2) * length).amax((2, 3)).cpu())
    return torch.stack(errors).amax(0)


def keys_of_one_token(model: nn.Module, layers: Iterable[int], batch: Mapping[str, Any]) -> list[Tensor]:
    """Keys `[H_kv, T, D]` per layer of a prompt in which each attention is given one hidden state, repeated."""
    layers = list(layers)
    cache = KeysSeen(config=model.config.get_text_config(decoder=True))
    name = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    # without ids, Qwen-VL takes the rows of its newest prompt to be these: as many are needed
    rows = 1 if name == "input_ids" else len(batch[name])
    last = batch[name][:rows, -1:]
    with torch.inference_mode(False), torch.no_grad(), uncompiled(), repeated_hidden_states(model, layers):
        repeated = last.clone().expand(-1, PROBE_TOKENS, *last.shape[2:])
        beside = {key: x[:rows].clone() for key, x in pictures_beside(batch, PROBE_TOKENS).items()}
        model(**with_cache(model, {name: repeated, **beside, "use_cache": True}, cache))
    return [cache.keys_by_layer[i][0] for i in layers]


class KeysSeen(DynamicCache):
    """transformers' cache; `keys_by_layer`: the keys of each layer's last update."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.keys_by_layer: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.keys_by_layer[layer_idx] = key_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextmanager
def repeated_hidden_states(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Give the modules of these layers their first token's hidden state for every token, in this thread."""
    layers, thread = set(layers), get_ident()

    def repeat(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if get_ident() != thread:
            return None
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": first_repeated(kwargs["hidden_states"])}
        return ((first_repeated(args[0]), *args[1:]), kwargs) if args else None

    attentions = [module for module in model.modules() if getattr(module, "layer_idx", None) in layers]
    handles = [module.register_forward_pre_hook(repeat, with_kwargs=True) for module in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_repeated(states: Any) -> Any:
    """Hidden states `[..., T, H]` with the first token's for all; anything else as it is."""
    if isinstance(states, Tensor) and states.is_floating_point() and states.shape[-2:-1] == (PROBE_TOKENS,):
        return states[..., :1, :].expand_as(states)
    return states


def rotating_error(keys: list[Tensor], frequencies: Tensor) -> float:
    """Largest relative difference, over layers, between the first key and the others rotated back to it; inf where they cannot rotate."""
    if any(2 * len(frequencies) > k.shape[-1] for k in keys):
        return float("inf")
    rotations = rotations_at(torch.arange(keys[0].shape[1], device=frequencies.device), frequencies)
    errors = []
    for k in keys:
        still = rotated(k.float(), rotations.to(k.device), back=True)
        first = still[:, :1]
        errors.append(float((still - first).norm(dim=-1).amax() / first.norm(dim=-1).amax().clamp_min(1e-12)))
    return max(errors)
