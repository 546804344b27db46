"""Bytes that a cache holds, really counted."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from apack_compile.cache.cache import CompactedCache
    from apack_compile.cache.layer import CompactedLayer
    from apack_compile.plan.plan import Plan

DENSE_ELEMENT_BYTES = 2
# What codes are counted as, among the parts of a report.
PACKED = "packed tokens and free slots"
# What packed layers keep as transformers has it.
KEPT_BESIDE = ("conv_states", "recurrent_states", "indexer_keys", "indexer_position_ids")


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors in an attribute: itself, or in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def unpacked_tensors(cache: "CompactedCache") -> Iterator[Tensor]:
    """What a cache holds as transformers has it: of layers that are not packed, and what those that are keep beside packed tokens."""
    for layer in cache.layers:
        held = vars(layer)
        if layer in cache.packed_layers:
            held = {name: held.get(name) for name in KEPT_BESIDE}
        yield from tensors_in(held)


def more_than_dense(held: int, dense: int, parts: Mapping[str, int] | None = None) -> str | None:
    """What is said where something holds more bytes than a 16-bit dense cache would; None where it does not."""
    if held <= dense:
        return None
    said = largest_of(parts or {}, held)
    return f"holds more than a 16-bit dense cache: {held:,} bytes instead of {dense:,}" + (f"; {said}" if said else "")


def less_than_asked(ratio: float, held: Mapping[str, Any]) -> str | None:
    """What is said where a cache is clearly larger than a ratio asks for: what it holds beside packed tokens; None where it is not."""
    if held["ratio"] >= 0.95 * ratio:
        return None
    beside = {name: size for name, size in held["parts"].items() if name != PACKED}
    said = largest_of(beside, held["sequence_bytes"])
    return f"holds {held['ratio']:.2f}x, not {ratio:g}x, at {held['tokens']} tokens" + (f": {said}" if said else "")


def largest_of(parts: Mapping[str, int], held: int) -> str:
    """The two largest parts of what is held, in words."""
    largest = sorted(parts.items(), key=lambda part: -part[1])[:2]
    return ", ".join(f"{size / held:.0%} {name}" for name, size in largest if size)


def shared_tensors(plan: "Plan") -> list[Tensor]:
    """What a plan holds for all requests."""
    shared = [tensor for bases in plan.bases.values() for basis in bases for tensor in basis]
    if plan.rotation is not None:
        shared += tensors_in(list(vars(plan.rotation).values()))
    return shared if plan.coarse is None else [*shared, *plan.coarse.weights.values()]


def seen_tokens(layer: "CompactedLayer") -> int:
    """Tokens of a row that a dense cache of this layer would hold."""
    held, window = int(layer.get_seq_length()), layer.index.window
    return held if window is None else min(held, window)


def cache_report(cache: "CompactedCache") -> dict[str, Any]:
    """What the cache holds, in bytes.

    tokens: logical tokens of all rows. dense_bytes: a 16-bit dense cache of them (for layers with a window, of the tokens inside
    of it; for what is not packed, of what is held).
    sequence_bytes: all that grows with requests: codes, scales, per-sequence bases, dense tokens, positions, coordinates, rotations.
    unpacked_bytes: of them, what is held as transformers has it. model_bytes: model-scoped bases, the rotation's tensors and a
    coarse rule's weights. captured: smallest share of a stream's variance that a shared basis kept (1 without any). ratio:
    dense_bytes / sequence_bytes, of which a prefix that rows share is counted once. parts: sequence_bytes by what they are for.
    """
    packed = [layer for layer in cache.packed_layers if layer.is_initialized]
    plans = [*cache.groups.plans, *(group.index.prefix.plan for group in cache.groups if group.index.prefix)]
    model = [tensor for plan in plans if plan is not None for tensor in shared_tensors(plan)]
    own = list(unpacked_tensors(cache))
    placed = [t for group in cache.groups for t in (*group.index.positions, *group.index.rotations)]
    known = [vars(group.index.coordinates) for group in cache.groups if group.index.coordinates is not None]
    parts: dict[str, list[Tensor]] = {
        PACKED: [],
        "the prefix of all rows": [],
        "first and newest tokens, dense": [],
        "bases of these sequences": [],
        "positions, rotations and tiers": [*placed, *tensors_in(known), *tensors_in(cache.groups.history)],
        "layers that are not packed": own,
    }
    dense = sum(t.numel() for t in own) * DENSE_ELEMENT_BYTES
    shared = {t.untyped_storage().data_ptr() for t in model}
    tokens = 0
    for layer in packed:
        tokens = layer.batch_size * int(layer.get_seq_length())
        widths = layer.num_heads * sum(states.shape[3] for states in (layer.first.key, layer.first.value))
        dense += layer.batch_size * seen_tokens(layer) * widths * DENSE_ELEMENT_BYTES
        parts[PACKED] += layer.packed_tensors()
        parts["the prefix of all rows"] += layer.shared.tensors
        parts["first and newest tokens, dense"] += layer.dense_tensors()
        parts["bases of these sequences"] += [
            t for t in layer.basis_tensors() if t.untyped_storage().data_ptr() not in shared
        ]
        parts["positions, rotations and tiers"] += [
            layer.cursor,
            *layer.own_positions,
            *layer.own_rotations,
            *(layer.tiers.tensors() if layer.tiers is not None else ()),
        ]
    sequence_bytes = storage_bytes([t for tensors in parts.values() for t in tensors])
    return {
        "tokens": tokens,
        "dense_bytes": dense,
        "sequence_bytes": sequence_bytes,
        "model_bytes": storage_bytes(model),
        "unpacked_bytes": storage_bytes(own),
        "captured": 1 - max((fit.found for layer in packed for fit in layer.fits.values()), default=0.0),
        "ratio": dense / sequence_bytes if sequence_bytes else 1.0,
        "parts": {name: storage_bytes(tensors) for name, tensors in parts.items()},
    }
