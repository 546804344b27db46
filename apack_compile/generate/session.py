"""What `optimize` keeps on a model."""

import hashlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from apack_compile.cache.cache import CompactedCache, LayerKind
from apack_compile.cache.kept_layers import CROSS_ATTENTION, kept_layer
from apack_compile.cache.packed_layers import PACKED_LAYERS, can_compile
from apack_compile.calibration.collect import Observation, Statistics, collect
from apack_compile.calibration.find_rotation import find_turn
from apack_compile.checks import counted
from apack_compile.config import DEFAULT_RATIO, AttentionPackConfig
from apack_compile.errors import StrictError
from apack_compile.generate.decode_step import DecodeSteps
from apack_compile.models.cache_argument import cache_of, named_arguments, takes_cache
from apack_compile.models.continuous_batching import refuse_paged_cache
from apack_compile.models.coordinates import positions_given, rotary_modules
from apack_compile.models.modality import padding_of, vision_of
from apack_compile.models.offload import computing_device
from apack_compile.models.wrappers import adapters_of
from apack_compile.plan.bits import largest_ratio
from apack_compile.plan.budget import budget_key, budget_plan
from apack_compile.plan.choice import Groups, Shapes, head_groups_for
from apack_compile.plan.file import versions
from apack_compile.plan.importance import CoarseRule, tells_apart
from apack_compile.plan.plan import Plan, Provenance
from apack_compile.plan.ranks import ALONE, Ranks, agreed_id, heads_here
from apack_compile.plan.ring import block_for
from apack_compile.plan.rotation import KeyTurn
from apack_compile.plan.time_model import default_min_tokens

ATTRIBUTE = "_apack_session"
DEFAULT_NEW_TOKENS = 64
FULL_ATTENTION = "full_attention"
LATENT_ATTENTION = "latent_attention"
# How often layers are read that a forward pass reads again, as configs call it.
LOOPS = ("loop_num_passes", "n_recurrent_loops")
# Layers with a linear attention or a short convolution alone.
LINEAR = ("linear_attention", "conv")


# What a second optimize keeps of a calibration.
TAKEN_OVER = (
    "statistics",
    "rules",
    "ranked",
    "turns",
    "turn_reasons",
    "groups",
    "calibrated_on",
    "calibration_id",
    "without_gradients",
    "adapters",
    "outdated",
)


@dataclass
class Session:
    """Configuration, calibrated statistics, plans and sites of one optimized model; with `plan`, all prompts use that one."""

    config: AttentionPackConfig
    kinds: list[LayerKind]
    signature: tuple
    inner: str | None
    inner_reason: str
    # Layers that are packed, and those that a preset does not pack because their window is too small.
    can_be_packed: list[int]
    plan: Plan | None = None
    statistics: Statistics | None = None
    rules: Mapping[str, CoarseRule] = field(default_factory=dict)
    # Modalities that the calibration looked for a rule in.
    ranked: tuple[str, ...] = ()
    # How keys turn and why, by window.
    turns: dict[int | None, KeyTurn | None] = field(default_factory=dict)
    turn_reasons: dict[int | None, str] = field(default_factory=dict)
    groups: Groups | None = None
    calibrated_on: str | None = None
    # The same on all ranks of tensor parallelism.
    calibration_id: str | None = None
    # The model's adapters when its bases were calibrated, or a plan was given.
    adapters: tuple = ()
    ranks: Ranks = ALONE
    # Why the calibration saw no gradients.
    without_gradients: str | None = None
    plans: dict[tuple, Plan] = field(default_factory=dict)
    decode: DecodeSteps | None = None
    hooks: tuple[Any, ...] = ()
    rotary_hooks: tuple[Any, ...] = ()
    last_cache: Any = None
    last_held: tuple[dict[str, Any], list[str]] | None = None
    # Forward passes of the model without a packed cache, since the last one with it.
    dense_passes: int = 0
    # A user's functions in whose place optimize put its own.
    replaced: dict[str, Any] = field(default_factory=dict)
    # Why the last generate used no packed cache.
    unused: str | None = None
    # Where the bases are to be.
    device: torch.device | None = None
    # Why the calibration may not be this model's any more.
    outdated: str | None = None
    # Threads may share a model: statistics and what belongs to them change together.
    lock: Any = field(default_factory=threading.RLock)
    # `cache`: the packed cache of the eager pass that this thread runs, weakly; `is_own`: whether generate or calibration runs in it.
    running: threading.local = field(default_factory=threading.local)

    def __deepcopy__(self, memo: dict) -> "Session":
        """For a copied model; what belongs to threads is its own."""
        copied = {
            f.name: deepcopy(getattr(self, f.name), memo) for f in fields(self) if f.name not in ("lock", "running")
        }
        return Session(**copied)

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimized model cannot be pickled: call apack_compile.restore(model) first, or use save_pretrained; "
            "calibrated bases are saved by apack_compile.plan_for(model, tokens).save(path)"
        )

    @property
    def graphs(self) -> list[Any]:
        """Records of the graphs compiled so far."""
        return [] if self.decode is None else self.decode.graphs

    @property
    def packed(self) -> list[int]:
        """Indices of the layers that are packed."""
        return [kind.layer for kind in self.kinds if kind.reason is None]

    @property
    def by_window(self) -> dict[int | None, list[int]]:
        """Indices of the packed layers that see so many of the newest tokens, all first."""
        windows = dict.fromkeys(kind.window for kind in self.kinds if kind.reason is None)
        ordered = sorted(windows, key=lambda window: window is not None)
        return {w: [kind.layer for kind in self.kinds if kind.reason is None and kind.window == w] for w in ordered}

    @property
    def turn(self) -> KeyTurn | None:
        """How keys turn by several coordinates, where those of some layers do; else how those of the first do."""
        turns = list(self.turns.values())
        if self.plan is not None:
            turns = [part.turn for part in self.plan.by_window.values()]
        return next((turn for turn in turns if turn is not None and turn.coordinates is not None), (*turns, None)[0])

    @property
    def ratio(self) -> float | None:
        """The ratio that plans are made for; None with a preset or a given plan."""
        return self.config.ratio if self.plan is None else None

    def min_tokens(self, device: str) -> int:
        """Tokens of a row from which generate packs, on a type of device."""
        if self.config.min_tokens is not None:
            return self.config.min_tokens
        return 0 if self.ratio is None else default_min_tokens(device)

    def too_short(self, prompt: int | None, new_tokens: int, device: str) -> str | None:
        """Why a generate call keeps transformers' own cache; None where it packs, as it does where the prompt's length is unknown."""
        least = self.min_tokens(device)
        if prompt is None or prompt + new_tokens >= least:
            return None
        return f"prompt of {prompt} and {counted(new_tokens, 'new token')}; packed from min_tokens={least} on"

    def plan_for(self, tokens: int, vision_share: float, window: int | None = None) -> Plan:
        """The plan for a prompt of so many tokens, this share of them vision, of the layers with this window."""
        layers = self.by_window[window]
        if self.plan is not None:
            return self.plan.of_layer(layers[0])
        if self.config.preset is not None:
            wanted = self.config.wanted(layers, window, self.can_be_packed)
            return self.signed(self.config.preset_options.plan(wanted), window)
        if self.statistics is None:
            raise RuntimeError(
                f"ratio={self.ratio:g}: no calibrated statistics yet; call apack_compile.calibrate(model, inputs) first. (A first request "
                "calibrates where the optimized model, or a model inside of it, is called with the cache.)"
            )
        key = budget_key(tokens, vision_share)
        key = key if window is None or tokens < window else (window, key[1])
        with self.lock:
            if (window, *key) not in self.plans:
                asked = self.config.coarse if window is None and tells_apart(self.ratio, key[0]) else ()
                rules = {modality: rule for modality, rule in self.rules.items() if modality in asked}
                statistics = {layer: self.statistics[layer] for layer in layers}
                plan = budget_plan(statistics, self.ratio, *key, turn=self.turns[window], rules=rules, window=window)
                plan = plan if self.device is None else plan.to(self.device)
                self.plans[window, *key] = self.signed(plan, window, self.calibrated_on, key)
            return self.plans[window, *key]

    def whole_plan(self, tokens: int, vision_share: float) -> Plan:
        """The plan for a prompt of so many tokens, this share of them vision, with those of the layers of all windows."""
        if self.plan is not None:
            return self.plan
        with self.lock:
            first, *others = (self.plan_for(tokens, vision_share, window) for window in self.by_window)
        return replace(first, windows={part.window: part for part in others}) if others else first

    def signed(self, plan: Plan, window: int | None, calibrated_on: str | None = None, made_for: tuple = ()) -> Plan:
        """A plan that says which model and which of its layers it is for, and where it comes from."""
        plan_id = None
        if self.ranks.count > 1:
            which = (self.calibration_id, self.config.to_json(), self.signature[-1], window, *made_for)
            plan_id = hashlib.sha256(repr(which).encode()).hexdigest()[:16]
        provenance = Provenance(calibrated_on, versions(), plan_id=plan_id)
        return replace(plan, signature=self.signature, ranks=self.ranks, window=window, provenance=provenance)

    def follow(self, model: nn.Module) -> None:
        """Take over the model's dtype and device as they are now; raises ValueError where a given plan was made for another dtype."""
        signature = signature_of(model)
        if self.plan is not None and signature != self.signature:
            raise ValueError(
                f"plan: made for {describe(self.plan.signature)}; the model now has {describe(signature)}; "
                "optimize it with a plan made for that"
            )
        device = computing_device(model)
        with self.lock:
            if (signature, device) != (self.signature, self.device):
                self.signature, self.device, self.plans = signature, device, {}
                self.plan = self.plan if self.plan is None else self.plan.to(device)

    def new_cache(self, model: nn.Module, expected_tokens: int) -> CompactedCache:
        """An empty cache for one batch of sequences; raises ValueError where the model cannot generate."""
        if computing_device(model).type == "meta":
            raise ValueError("model: its weights are on the meta device now; load them before it generates")
        self.follow(model)
        own = DynamicCache(config=model.config.get_text_config(decoder=True))
        strict = self.config.strict
        cache = CompactedCache(self.kinds, own, self.plan_for, expected_tokens, self.signature, strict, model.dtype)
        self.last_cache = weakref.ref(cache)
        return cache

    def calibrate(self, model: nn.Module, inputs: Any, source: str) -> None:
        """Fit model-scoped statistics on inputs; plans and later caches use them."""
        batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        with self.lock, self.own_passes(), torch.inference_mode(False), torch.no_grad():
            found = {
                window: self._find_turn(model, window, layers, batches[0]) if batches else (None, "")
                for window, layers in self.by_window.items()
            }
            calibration_id = agreed_id(model)
            turns = {window: turn for window, (turn, _) in found.items()}
            by_layer = {layer: turns[window] for window, layers in self.by_window.items() for layer in layers}
            chosen: list[Groups] = []

            def groups(seen: Observation) -> int:
                chosen.append(self.groups_for(model, attention_shapes(model, seen)))
                return chosen[0].count

            ranked = self.by_window.get(None, [])
            coarse = self.config.coarse if ranked else ()
            statistics, rules, without_gradients = collect(
                model, self.packed, batches, groups, by_layer, coarse, ranked
            )
            # all or nothing: an interrupt between two of them would leave statistics of one calibration and turns of another
            vars(self).update(
                statistics=statistics,
                rules=rules,
                without_gradients=without_gradients,
                turns=turns,
                turn_reasons={window: reason for window, (_, reason) in found.items()},
                ranked=self.config.coarse,
                groups=chosen[0],
                calibrated_on=source,
                calibration_id=calibration_id,
                outdated=None,
                adapters=adapters_of(model),
                plans={},
            )

    def _find_turn(
        self, model: nn.Module, window: int | None, layers: list[int], batch: Mapping[str, Any]
    ) -> tuple[KeyTurn | None, str]:
        """How the keys of the layers with a window turn, and why."""
        block = self.config.key_block if window is None else block_for(window, self.config.key_block)
        return find_turn(model, layers, batch, block)

    def groups_for(self, model: nn.Module, shapes: Shapes) -> Groups:
        """Head groups for layers of these shapes, on the model's device."""
        if self.config.head_groups is not None:
            return Groups(self.config.head_groups, "as configured", shapes)
        ratio = self.ratio or DEFAULT_RATIO
        return head_groups_for(shapes, model.dtype, ratio, self.config.key_block, computing_device(model).type)

    def calibrate_on_first(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Calibrate on a first request, where nothing else did; raises ValueError for one that is too short."""
        with self.lock:
            if not self.needs_calibration():
                return
            try:
                self.calibrate(model, inputs, "the first request")
            except ValueError as error:
                raise ValueError(
                    f"ratio={self.ratio:g}: the first request cannot serve as calibration ({error}); "
                    "call apack_compile.calibrate(model, inputs) on longer ones first"
                ) from error

    def remember(self, cache: CompactedCache) -> None:
        """Keep what a cache holds, for the report; the cache itself may go."""
        plan = cache.index.plan
        coarse = None if plan.coarse is None else {"modality": plan.coarse.modality, "share": plan.coarse.share}
        held = {**cache.report(), "tail_slots": plan.tail_slots, "coarse": coarse}
        self.last_held = (held, list(cache.notes))

    def held(self) -> tuple[dict[str, Any], list[str]] | None:
        """Bytes and notes of the last cache: as it is now, or as its last generate left it."""
        cache = self.last_cache() if self.last_cache is not None else None
        if cache is not None and cache.is_filled:
            self.remember(cache)
        return self.last_held

    def take_calibration(self, other: "Session", model: nn.Module) -> None:
        """Take over what another session of the model calibrated, where this one's plans can use it; else say why not."""
        if other.statistics is None:
            return
        with_plan = self.plan is not None or other.plan is not None
        if with_plan and (other.outdated is not None or other.adapters != self.adapters):
            return
        groups = other.groups if self.ratio is None else self.groups_for(model, other.groups.shapes)
        usable = {
            f"key_block={other.config.key_block}": self.config.key_block == other.config.key_block,
            f"head_groups={other.groups.count}": groups.count == other.groups.count,
            f"coarse={other.ranked}": set(self.config.coarse) <= set(other.ranked),
        }
        if not all(usable.values()):
            was = ", ".join(name for name, fits in usable.items() if not fits)
            if self.ratio is not None:
                self.outdated = (
                    f"the earlier calibration cannot be used (it was made with {was}): "
                    "call calibrate, or the next request is calibrated on"
                )
            return
        for name in TAKEN_OVER:
            setattr(self, name, getattr(other, name))

    def tell(self, cache: CompactedCache, text: str) -> None:
        """Note on a cache what was not done as asked; raises StrictError when strict."""
        if self.config.strict:
            raise StrictError(f"strict: {text}")
        cache.note(text)

    def count_dense(self) -> None:
        """A forward pass of the model was given no packed cache; those of generate and calibration say so elsewhere."""
        if not getattr(self.running, "is_own", False):
            self.dense_passes += 1

    @contextmanager
    def own_passes(self) -> Iterator[None]:
        """Forward passes of this thread are those of generate or of calibration."""
        before, self.running.is_own = getattr(self.running, "is_own", False), True
        try:
            yield
        finally:
            self.running.is_own = before

    def needs_calibration(self) -> bool:
        """Whether a plan needs statistics that are not there."""
        return self.ratio is not None and self.statistics is None


def session_of(model: nn.Module) -> Session | None:
    """The session of an optimized model, or None."""
    return vars(model).get(ATTRIBUTE)


def layer_kinds(model: nn.Module) -> list[LayerKind]:
    """What each layer of the model's cache gets; raises ValueError for a model without a KV cache."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"model: {name} has no decoder-only KV cache that could be packed: an encoder reads pictures and prompt"
        )
    if not layers:
        raise ValueError(f"model: {name} has no decoder-only KV cache that could be packed: its config names no layers")
    passes = max(getattr(config, loops, None) or 1 for loops in LOOPS)
    if passes > 1:
        raise ValueError(
            f"model: {name} reads some layers {passes} times and adds layers to its cache for that, which are not packed"
        )
    types = list(getattr(config, "layer_types", None) or [FULL_ATTENTION] * len(layers))[: len(layers)]
    crossing = [type(part).__name__ for part in generating_parts(model)[1:] if shares_cross_attention(part)]
    if crossing:
        raise ValueError(f"model: {crossing[0]} keeps what it attends to across in the layers of its own tokens")
    if getattr(config, "kv_lora_rank", None):
        types = [LATENT_ATTENTION if has_keys(layer) else kind for kind, layer in zip(types, layers, strict=True)]
    for i in getattr(config, "cross_attention_layers", None) or ():
        types[i] = CROSS_ATTENTION
    kinds = []
    for i, (kind, layer) in enumerate(zip(types, layers, strict=True)):
        reason = reason_of(kind, layer)
        compileable = can_compile(layer) if reason is None else bool(kept_layer(layer, kind).is_compileable)
        kinds.append(LayerKind(i, kind_name(kind, layer), reason, compileable, has_keys(layer), window_of(layer)))
    return kinds


def planned_kinds(kinds: list[LayerKind], plan: Plan) -> list[LayerKind]:
    """Kinds of layers with a given plan: those with a window are packed where it has them."""
    left = "the plan given has no streams for it; plan_for gives one with those of all layers"
    return [
        replace(kind, reason=f"{kind.layer_type}: {left}", compileable=False)
        if kind.window is not None and kind.layer not in plan.every_layer
        else kind
        for kind in kinds
    ]


def shares_cross_attention(part: nn.Module) -> bool:
    """Whether a model is a BERT-like decoder, which uses one cache layer for both its attentions."""
    return any(name.endswith(".crossattention") for name, _ in part.named_modules())


def kind_name(layer_type: str, layer: Any) -> str:
    """The config's name of a layer, corrected where its cache layer says it slides."""
    return "sliding_attention" if getattr(layer, "is_sliding", False) and layer_type == FULL_ATTENTION else layer_type


def reason_of(layer_type: str, layer: Any) -> str | None:
    """Why a layer keeps transformers' own cache layer; None when it is packed."""
    kept = f"transformers' {type(layer).__name__} is kept"
    if layer_type == CROSS_ATTENTION:
        return f"{layer_type}: written once, from the pictures; {kept}"
    if layer_type == LATENT_ATTENTION:
        return f"{layer_type}: what is cached is latent already; {kept}"
    if not has_keys(layer):
        held = "a state of one size for any number of tokens" if layer_type in LINEAR else "nothing of its own"
        return f"{layer_type}: holds {held}, no keys and values"
    return None if type(layer) in PACKED_LAYERS else f"{kind_name(layer_type, layer)}: {kept}"


def has_keys(layer: Any) -> bool:
    """Whether a layer of transformers' cache holds keys and values of its own: no linear states alone, no readers of another layer's."""
    return isinstance(layer, CacheLayerMixin)


def window_of(layer: Any) -> int | None:
    """Newest tokens that a query of a layer sees, itself included; None for all."""
    return getattr(layer, "sliding_window", None) if type(layer) in PACKED_LAYERS else None


def signature_of(model: nn.Module) -> tuple:
    """What a cache must agree on with a model: layers, dtype, and this rank's KV heads and head_dim of the first full-attention layer."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or []
    full = types.index(FULL_ATTENTION) if FULL_ATTENTION in types else 0
    return (config.num_hidden_layers, *kv_heads(model, full), str(model.dtype))


def kv_heads(model: nn.Module, layer: int) -> tuple[int, int]:
    """This rank's KV heads of a layer, and their head_dim."""
    config = model.config.get_text_config(decoder=True)
    own = config.per_layer_config[layer] if config.is_heterogeneous else config
    heads = getattr(own, "num_key_value_heads", None) or getattr(own, "num_attention_heads", None)
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    return heads_here(model, heads, head_dim), head_dim


def attention_shapes(model: nn.Module, seen: Observation) -> Shapes:
    """Query heads (as many as KV heads where the config does not say), KV heads and head_dim of the layers that were observed."""
    config = model.config.get_text_config(decoder=True)
    shapes = set()
    for i, (key, _) in seen.states.items():
        layer = config.per_layer_config[i] if config.is_heterogeneous else config
        heads, head_dim = key.shape[1], key.shape[3]
        shapes.add((max(getattr(layer, "num_attention_heads", None) or 0, heads), heads, head_dim))
    return tuple(sorted(shapes))


def check_ratio(ratio: float, groups: int, model: nn.Module) -> None:
    """Raise ValueError for a ratio that no plan can reach, and for head groups that do not divide the KV heads."""
    _, heads, head_dim, _ = signature_of(model)
    if heads % groups:
        raise ValueError(f"head_groups={groups} must divide the model's {heads} KV heads")
    reachable = largest_ratio(heads // groups * head_dim)
    if ratio > reachable:
        raise ValueError(
            f"ratio={ratio!r} is out of reach: the largest for KV width {heads // groups * head_dim} is {reachable:.1f}"
        )


def generating_parts(model: nn.Module) -> list[nn.Module]:
    """The model, and the models inside of it that its own kind of generate may hand the cache to."""
    if type(model).generate is GenerationMixin.generate:
        return [model]
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def rename_cache(
    name: str, part: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a part that takes a cache: a packed one given by another name than the part's own goes on under that one."""
    cache = cache_of((), kwargs)
    if not isinstance(cache, CompactedCache) or kwargs.get(name) is cache:
        return None
    return args, {**{key: x for key, x in kwargs.items() if x is not cache}, name: cache}


def cache_users(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that may be called with its cache: those that generate, and the models inside of them."""
    decoders = (module for module in model.modules() if isinstance(module, PreTrainedModel) and takes_cache(module))
    return list(dict.fromkeys((*generating_parts(model), *decoders)))


def watch_forward(model: nn.Module, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a part that takes a cache: tell a packed one what is coming, refuse a paged one; count passes without one."""
    cache, compiling = cache_of(args, kwargs), torch.compiler.is_dynamo_compiling()
    refuse_paged_cache(cache)
    if not isinstance(cache, CompactedCache):
        if part is model and not compiling:
            session_of(model).count_dense()
        return
    if compiling and cache.is_filled:
        return
    is_inside = cache.is_told if compiling else cache.running not in (None, id(part))
    if is_inside and part is not model:
        return
    announce(model, part, cache, args, kwargs)
    if not compiling:
        note_call(model, part, cache, kwargs)
        begin_forward(session_of(model), part, cache)


def note_call(model: nn.Module, part: nn.Module, cache: CompactedCache, kwargs: Mapping[str, Any]) -> None:
    """Say that the cache was found where generate does not put it: that it is packed all the same need not be expected."""
    if part not in generating_parts(model):
        cache.note(f"{type(part).__name__} was called itself: packed as when {type(model).__name__} is called")
    elif cache_of((), kwargs) is not cache:
        cache.note("the cache was passed by position: packed as when it is passed by name")


def begin_forward(session: Session, part: nn.Module, cache: CompactedCache) -> None:
    """An eager pass of a part over a packed cache begins."""
    cache.running, cache.chunks_before, session.dense_passes = id(part), cache.eager_chunks, 0
    session.running.cache = weakref.ref(cache)
    cache.show_attention(attention_of(part) == "sdpa")


def attention_of(model: nn.Module) -> str:
    """The implementation of a model's attention: states are stored and watched for "sdpa", others are spelled otherwise."""
    return model.config.get_text_config(decoder=True)._attn_implementation


def end_forward(model: nn.Module, part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook, called after errors too: stop watching, and say what was not stored or not seen."""
    cache = cache_of(args, kwargs)
    if torch.compiler.is_dynamo_compiling() or not isinstance(cache, CompactedCache) or cache.running != id(part):
        return
    cache.running = None
    cache.show_attention(False)
    session = session_of(model)
    session.running.cache = None
    if output is None:
        cache.recover()
        return
    if cache.is_told:
        why = " (gradient checkpointing in train mode)" if is_checkpointing(part) else ""
        session.tell(cache, f"{type(part).__name__}.forward stored nothing in the packed cache that it was given{why}")
    has_tiers = any(plan is not None and plan.tiers is not None for plan in cache.plans)
    if cache.is_filled and has_tiers and cache.eager_chunks == cache.chunks_before:
        cache.note(
            "a forward compiled by hand: unless its backend is attentionpack, it reads every token held, not tiers"
        )
    unseen = cache.unsettled() if cache.is_filled else []
    if unseen:
        layers = ", ".join(map(str, unseen))
        session.tell(cache, f"layers {layers}: no scaled_dot_product_attention was seen; every token is kept and read")


def is_checkpointing(part: nn.Module) -> bool:
    """Whether a part recomputes its layers in a backward pass, for which transformers takes their cache away."""
    return part.training and any(getattr(module, "gradient_checkpointing", False) for module in part.modules())


def watch_rotary(model: nn.Module) -> None:
    """Where keys turn by several coordinates, see what rotary embeddings are given, from now on."""
    session = session_of(model)
    turn = None if session is None else session.turn
    if session is None or turn is None or turn.coordinates is None or session.rotary_hooks:
        return
    session.rotary_hooks = tuple(
        module.register_forward_pre_hook(partial(show_positions, model), with_kwargs=True)
        for module in rotary_modules(model)
    )


def show_positions(model: nn.Module, rotary: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a rotary embedding: show what it is given to the packed cache of this thread's eager pass."""
    if torch.compiler.is_dynamo_compiling():
        return
    session, positions = session_of(model), positions_given(args, kwargs)
    running = None if session is None else getattr(session.running, "cache", None)
    cache = None if running is None else running()
    if cache is not None and positions is not None:
        cache.show_positions(positions)


def note_new_weights(model: nn.Module, incompatible_keys: Any) -> None:
    """Load-state-dict hook: what was calibrated belongs to the weights before."""
    session = session_of(model)
    if session is not None and (session.plan is not None or session.statistics is not None):
        what = "pass a plan made for these weights" if session.plan is not None else "call calibrate again"
        session.outdated = f"load_state_dict after the bases were calibrated: they fit the weights before it; {what}"


@torch.compiler.disable
def announce(model: nn.Module, part: nn.Module, cache: CompactedCache, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Check that a cache belongs to the model, calibrate on its first prompt if nothing else did, and pass on modalities."""
    if cache.signature != signature_of(model):
        raise ValueError(
            f"cache: one for {describe(cache.signature)} was passed to a model with {describe(signature_of(model))}"
        )
    inputs = named_arguments(part, args, kwargs)
    states = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if states is None or states.shape[1] == 0:
        raise ValueError("input_ids: the prompt has zero tokens; pass at least one")
    if cache.is_filled and states.shape[0] != cache.batch_size:
        raise ValueError(
            f"input_ids: batch size is {states.shape[0]}, but this cache holds {cache.batch_size}; use a new cache"
        )
    if cache.running is not None:
        cache.recover()
    cache.check_whole()
    session = session_of(model)
    if cache.planner is not None:
        session.calibrate_on_first(part if part in generating_parts(model) else model, inputs)
        watch_rotary(model)
    if inputs.get("input_ids") is None:
        cache.note("inputs_embeds without input_ids: vision positions unknown, all tokens taken as text")
    # A single token is a generated one, whatever its id: no picture is that small.
    vision, held = vision_of(model.config, inputs) if states.shape[1] > 1 else None, int(cache.get_seq_length())
    if vision is not None and cache.prompt_end is not None:
        vision[:, max(cache.prompt_end - held, 0) :] = False
    cache.expect(vision, padding_of(inputs, states.shape[1], held))


def describe(signature: tuple) -> str:
    """A signature in words."""
    layers, heads, head_dim, dtype = signature
    return f"{counted(layers, 'layer')}, {counted(heads, 'KV head')} x {head_dim}, {dtype}"
