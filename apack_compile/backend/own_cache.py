"""Packed state in the place of static key and value buffers that a compiled module owns (backend option `own_cache`).

When it is made, when it is dropped, and what must not happen to the buffers in between. own_cache_graph.py runs the graphs.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import DynamicCache

from apack_compile.backend.release import regain, release
from apack_compile.cache.accounting import DENSE_ELEMENT_BYTES
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer import CompactedLayer
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.calibration.streams import Running, RunningMoments, by_layer, fitted
from apack_compile.checks import counted
from apack_compile.kernels.cursor import HELD
from apack_compile.kernels.heads import to_groups
from apack_compile.plan.budget import budget_key, budget_plan
from apack_compile.plan.choice import PackedLayers, Weights, alike, head_groups_for
from apack_compile.plan.file import versions
from apack_compile.plan.plan import FIRST_TOKENS, Plan, Provenance
from apack_compile.plan.source import PlanSource, Statistics
from apack_compile.plan.time_model import is_aligned

# A call of more tokens over buffers that are still dense is a prefill and leaves them dense.
MAX_DECODE = 8
# Fewer tokens say too little about those to come: a basis fitted to them would lose most of what follows.
LEAST_TOKENS = 64

Pair = tuple[Tensor, Tensor]
# Of both buffers, which dimensions are `[B, H_kv, T, D]`.
Layouts = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Packed:
    """What stands for one pair of buffers: a layer of a packed cache, and the buffers' versions when they were released.

    state, layout: as the operations are given them (kernels/state.py); what is written later is written into these tensors.
    """

    cache: CompactedCache
    layer: CompactedLayer
    state: tuple[Tensor, ...]
    layout: tuple[int, ...]
    versions: tuple[int, int]
    released: int


class OwnCaches:
    """The packed state of every pair of static buffers that the graphs of one `torch.compile` write.

    ratio: 16-bit bytes of the buffers over packed bytes. plan: a saved plan, whose i-th layer serves the i-th pair of a graph (of a
    plan with those of several windows, the layers that see every token); else
    the first sequence in buffers of about this length gives one, which later sequences share. options: those of the torch.compile.
    """

    def __init__(self, ratio: float, plan: Plan | None = None, options: Mapping[str, Any] | None = None) -> None:
        if plan is not None and plan.has_coordinates:
            raise ValueError(
                "option plan: its keys rotate by several coordinates of a token, and static buffers do not say where their tokens are; "
                "make it with AttentionPackConfig(key_block=0)"
            )
        if plan is not None and (plan.per_request or plan.tiers is not None):
            what = "bases fitted to each cache" if plan.per_request else "tiers"
            raise ValueError(
                f"option plan: a plan with {what} cannot serve static buffers; make one with optimize(model, ratio=...)"
            )
        self.options = options
        self.ratio = ratio
        # static buffers of layers with a window slide, and stay dense
        self.plan = None if plan is None else replace(plan, windows={})
        self.plans: dict[tuple, Plan] = {}
        self.last: dict[str, Any] | None = None
        self.held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def before(
        self,
        pairs: Sequence[Pair],
        layouts: Sequence[Layouts],
        positions: Sequence[Tensor],
        weights: Callable[[], Iterable[Tensor]],
    ) -> list[Packed] | None:
        """The packed state that a call writing at `positions` must use; None where it is to run dense.

        weights: gives the parameters of the graph, beside which bases may weigh so much.
        Raises RuntimeError for buffers that were written outside, and ValueError for positions that packed state cannot take.
        """
        start, count = span_of(positions)
        slots = pairs[0][0].shape[layouts[0][0][2]]
        if start + count > slots:
            raise ValueError(f"positions {start} to {start + count - 1}: the buffers end at {slots}")
        found = [self._held(pair, how, start) for pair, how in zip(pairs, layouts, strict=True)]
        if start == 0:
            self.forget(itertools.chain.from_iterable(pairs))
            return None
        if not any(found):
            if count > MAX_DECODE or start < LEAST_TOKENS:
                return None
            found = self._pack(pairs, layouts, start, Weights.of(weights()))
        if not all(found):
            raise RuntimeError("own_cache: some of this graph's buffers are packed, others dense")
        for cache in dict.fromkeys(packed.cache for packed in found):
            follow(cache, start)
        return found

    def check_dense(self, buffer: Tensor) -> None:
        """Raise RuntimeError for a packed buffer, which a graph wants to read as it was."""
        packed = self.held.get(buffer)
        if packed is not None:
            raise RuntimeError(
                f"own_cache: the buffers of layer {packed.layer.layer_idx} are packed, and this graph reads them in a way that has no "
                "packed form (report of the option log says why); GraphLog.forget() drops what is packed"
            )

    def forget(self, buffers: Iterable[Tensor]) -> None:
        """Drop what is packed for these buffers, which are dense and empty again."""
        for buffer in buffers:
            if self.held.pop(buffer, None) is not None:
                regain(buffer)

    def _held(self, pair: Pair, layouts: Layouts, start: int) -> Packed | None:
        """What is packed for a pair before a call at `start`; None for dense buffers, and for those that were filled anew."""
        packed = self.held.get(pair[0])
        if packed is None or start == 0 or versions_of(pair) == packed.versions:
            return packed
        if not all(bool(states[:, :, :start].any(-1).all()) for states in states_of(pair, layouts)):
            raise RuntimeError(
                f"own_cache: the buffers of layer {packed.layer.layer_idx} were written outside of the compiled graphs while their "
                f"{int(packed.layer.cursor[HELD])} tokens were packed, and not all of positions 0 to {start - 1}: neither is valid. "
                "Write a sequence from position 0 on, or through the compiled module"
            )
        for buffer in pair:
            del self.held[buffer]
        return None

    @torch.no_grad()
    def _pack(
        self, pairs: Sequence[Pair], layouts: Sequence[Layouts], tokens: int, weights: Weights | None
    ) -> list[Packed]:
        """Pack the first `tokens` tokens of dense buffers and release them."""
        if any(buffer.is_inference() for pair in pairs for buffer in pair):
            raise ValueError("own_cache: buffers made in inference mode do not tell who writes them; make them outside")
        held = [states_of(pair, how) for pair, how in zip(pairs, layouts, strict=True)]
        filled = [tuple(states[:, :, :tokens] for states in pair) for pair in held]
        plan = self._plan_for(held, filled, weights)
        kinds = [LayerKind(layer, "static buffer", None) for layer in range(len(pairs))]
        # every slot that the buffers could ever need is there from the start
        cache = CompactedCache(kinds, DynamicCache(), PlanSource(given=plan), max_tokens=held[0][0].shape[2])
        for i, (key, value) in enumerate(filled):
            cache.update(key, value, i)
        found = []
        for pair, layer in zip(pairs, cache.packed_layers, strict=True):
            released = sum(release(buffer) for buffer in pair)
            state, layout = layer.flat
            packed = Packed(cache, layer, tuple(state), tuple(layout), versions_of(pair), released)
            self.held[pair[0]] = self.held[pair[1]] = packed
            found.append(packed)
        self.last = self._live_report()
        return found

    def _plan_for(self, held: Sequence[Pair], filled: Sequence[tuple[Tensor, ...]], weights: Weights | None) -> Plan:
        """The plan of a graph's pairs: the given one, or one by the first sequence in such buffers."""
        key = held[0][0]
        if self.plan is not None:
            return renumbered(self.plan, held).to(key.device)
        streams = tuple(
            (states.shape[1], states.shape[3], states.dtype, states.device) for pair in held for states in pair
        )
        which = (streams, budget_key(key.shape[2], 0.0))
        if which not in self.plans:
            layers = alike(PackedLayers(heads, heads, head_dim) for _, heads, _, head_dim in (k.shape for k, _ in held))
            groups = head_groups_for(layers, key.dtype, self.ratio, 0, key.device.type, weights).count
            plan = budget_plan(
                statistics_of(filled, groups),
                self.ratio,
                *which[1],
                basis_limit=None if weights is None else weights.limit,
                aligned=is_aligned(key.device.type),
            )
            about_model = (len(held), key.shape[1], key.shape[3], str(key.dtype))
            provenance = Provenance(f"the first {filled[0][0].shape[2]} tokens in static buffers", versions())
            self.plans[which] = replace(plan, signature=about_model, provenance=provenance)
        return self.plans[which]

    def report(self) -> dict[str, Any] | None:
        """Bytes of what is packed now or, where those buffers are gone, was packed last; None where nothing was.

        layers: pairs of buffers; tokens: held by all rows; capacity: slots of a row; buffer_bytes: what the buffers took, dense_bytes:
        in 16 bits; released_bytes: given back to the system; packed_bytes: what stands for them; model_bytes: shared bases. ratio:
        dense_bytes / packed_bytes.
        """
        return self._live_report() or self.last

    def _live_report(self) -> dict[str, Any] | None:
        live = list({id(packed): packed for packed in self.held.values()}.values())
        if not live:
            return None
        caches = list(dict.fromkeys(packed.cache for packed in live))
        bytes_of = [cache.report() for cache in caches]
        elements = sum(
            layer.batch_size
            * cache.groups.max_tokens
            * layer.num_heads
            * sum(states.shape[3] for states in (layer.first.key, layer.first.value))
            for cache in caches
            for layer in cache.packed_layers
        )
        size = live[0].layer.dtype.itemsize
        packed_bytes = sum(held["sequence_bytes"] for held in bytes_of)
        return {
            "layers": len(live),
            "tokens": sum(held["tokens"] for held in bytes_of),
            "capacity": caches[0].groups.max_tokens,
            "buffer_bytes": elements * size,
            "dense_bytes": elements * DENSE_ELEMENT_BYTES,
            "released_bytes": sum(packed.released for packed in live),
            "packed_bytes": packed_bytes,
            "model_bytes": sum(held["model_bytes"] for held in bytes_of),
            "ratio": elements * DENSE_ELEMENT_BYTES / packed_bytes,
            "notes": [note for cache in caches for note in cache.notes],
        }


def versions_of(pair: Pair) -> tuple[int, int]:
    """How often each buffer of a pair was written."""
    return pair[0]._version, pair[1]._version


def states_of(pair: Pair, layouts: Layouts) -> Pair:
    """Keys and values in the buffers of a pair, `[B, H_kv, T, D]`."""
    return pair[0].permute(layouts[0]), pair[1].permute(layouts[1])


def span_of(positions: Sequence[Tensor]) -> tuple[int, int]:
    """First position and number of positions that a call writes, the same for all layers; raises ValueError for others."""
    distinct = list(dict.fromkeys(positions))
    # one transfer, however many layers count for themselves
    read = [torch.cat(distinct)] if len({where.device for where in distinct}) == 1 else distinct
    numbers = [number for where in read for number in where.tolist()]
    ends = list(itertools.accumulate(where.shape[0] for where in distinct))
    spans = {tuple(numbers[end - where.shape[0] : end]) for where, end in zip(distinct, ends, strict=True)}
    first = next(iter(spans))
    if len(spans) > 1 or list(first) != list(range(first[0], first[0] + len(first))):
        raise ValueError(f"own_cache: positions {sorted(spans)} must be consecutive and the same for all layers")
    return first[0], len(first)


def follow(cache: CompactedCache, start: int) -> None:
    """Drop tokens from `start` on, as a call that writes there does; raises ValueError where positions would stay empty."""
    held = int(cache.packed_layers[0].cursor[HELD])
    if start > held:
        raise ValueError(f"own_cache: position {start} comes after a gap: {held} tokens are held")
    if start < held:
        cache.crop(start - held)


def statistics_of(filled: Sequence[tuple[Tensor, ...]], groups: int) -> Statistics:
    """Statistics of what is in some buffers, `[B, H_kv, T, D]` each, without the first tokens; all streams count alike."""
    running: Running = {}
    for layer, pair in enumerate(filled):
        for stream, states in enumerate(pair):
            moments = running[layer, "text", stream] = RunningMoments()
            moments.add(to_groups(states[:, :, FIRST_TOKENS:], groups).transpose(0, 1).flatten(1, 2))
    return by_layer(fitted(running))


def renumbered(plan: Plan, held: Sequence[Pair]) -> Plan:
    """A plan for the layers of a model as one for pairs of `[B, H_kv, T, D]`; raises ValueError where it is for others."""
    _, heads, head_dim, dtype = plan.signature
    key = held[0][0]
    found = (len(held), key.shape[1], key.shape[3], str(key.dtype))
    if found != (len(plan.layers), heads, head_dim, dtype):
        raise ValueError(
            f"own_cache: plan is for {counted(len(plan.layers), 'layer')}, {heads} KV heads x {head_dim}, {dtype}; the graph has "
            f"{counted(found[0], 'pair')} of buffers, {found[1]} KV heads x {found[2]}, {found[3]}"
        )
    numbers = {layer: i for i, layer in enumerate(sorted(plan.layers))}
    coarse = plan.coarse and replace(plan.coarse, weights={numbers[i]: w for i, w in plan.coarse.weights.items()})
    return replace(
        plan,
        layers={numbers[i]: layer for i, layer in plan.layers.items()},
        bases={numbers[i]: bases for i, bases in plan.bases.items()},
        coarse=coarse,
    )
