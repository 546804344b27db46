"""What `optimize` keeps on a model."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, GenerationMixin
from transformers.cache_utils import DynamicCache

from apack_compile.backend import StrictError, make_backend
from apack_compile.cache import CompactedCache, LayerKind
from apack_compile.calibration import Statistics, collect
from apack_compile.config import AttentionPackConfig
from apack_compile.importance import LEAST_RATIO, CoarseRule
from apack_compile.modality import padding_of, vision_of
from apack_compile.plan import (
    Plan,
    Provenance,
    a_vl_plan,
    attentionpack_plan,
    budget_key,
    budget_plan,
    largest_ratio,
    lossless_plan,
)
from apack_compile.plan_file import versions
from apack_compile.rotary import KeyTurn, find_turn
from apack_compile.time_model import default_min_tokens
from apack_compile.watch import start_watching, stop_watching

ATTRIBUTE = "_apack_session"
FULL_ATTENTION = "full_attention"
CROSS_ATTENTION = "cross_attention"
LATENT_ATTENTION = "latent_attention"


@dataclass
class Session:
    """Configuration, calibrated statistics, plans and sites of one optimized model; with `plan`, all prompts use that one."""

    config: AttentionPackConfig
    kinds: list[LayerKind]
    signature: tuple
    inner: str | None
    inner_reason: str
    plan: Plan | None = None
    statistics: Statistics | None = None
    rules: Mapping[str, CoarseRule] = field(default_factory=dict)
    turn: KeyTurn | None = None
    turn_reason: str = ""
    calibrated_on: str | None = None
    plans: dict[tuple[int, float], Plan] = field(default_factory=dict)
    graphs: list[Any] = field(default_factory=list)
    quantized: int = 0
    hooks: tuple[Any, ...] = ()
    compile_config: CompileConfig | None = None
    last_cache: Any = None
    last_held: tuple[dict[str, Any], list[str]] | None = None
    # Why the last generate used no packed cache.
    unused: str | None = None

    @property
    def packed(self) -> list[int]:
        """Indices of the layers that are packed."""
        return [kind.layer for kind in self.kinds if kind.reason is None]

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
        return f"prompt of {prompt} and {new_tokens} new tokens; packed from min_tokens={least} on"

    def plan_for(self, tokens: int, vision_share: float) -> Plan:
        """The plan for a prompt of so many tokens, this share of them vision."""
        if self.plan is not None:
            return self.plan
        if self.config.preset == "lossless":
            return self.signed(lossless_plan(self.packed))
        if self.config.preset == "attentionpack":
            config = self.config
            plan = attentionpack_plan(self.packed, config.ranks, config.tail_slots, config.attentionpack)
            return self.signed(plan)
        if self.config.preset == "a-vl":
            return self.signed(a_vl_plan(self.packed, self.config.a_vl))
        if self.statistics is None:
            raise RuntimeError(
                "ratio: no calibrated statistics yet; call the model itself, or calibrate(model, inputs) first"
            )
        key = budget_key(tokens, vision_share)
        if key not in self.plans:
            rules = self.rules if self.ratio >= LEAST_RATIO else {}
            plan = budget_plan(self.statistics, self.ratio, *key, turn=self.turn, rules=rules)
            self.plans[key] = self.signed(plan, self.calibrated_on)
        return self.plans[key]

    def signed(self, plan: Plan, calibrated_on: str | None = None) -> Plan:
        """A plan that says which model it is for and where it comes from."""
        return replace(plan, signature=self.signature, provenance=Provenance(calibrated_on, versions()))

    def new_cache(self, model_config: Any, expected_tokens: int) -> CompactedCache:
        """An empty cache for one batch of sequences."""
        own = DynamicCache(config=model_config.get_text_config(decoder=True))
        return CompactedCache(self.kinds, own, self.plan_for, expected_tokens, self.signature)

    def calibrate(self, model: nn.Module, inputs: Any, source: str) -> None:
        """Fit model-scoped statistics on inputs; plans and later caches use them."""
        batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        turn, reason = find_turn(model, self.packed, batches[0], self.config.key_block) if batches else (None, "")
        self.statistics, self.rules = collect(
            model, self.packed, batches, self.config.head_groups, turn, self.config.coarse
        )
        self.turn, self.turn_reason = turn, reason
        self.calibrated_on = source
        self.plans = {}

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

    def calibrates_like(self, other: "Session") -> bool:
        """Whether statistics of this session serve the other's plans."""
        return all(
            getattr(self.config, name) == getattr(other.config, name) for name in ("key_block", "head_groups", "coarse")
        )

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
    types = list(getattr(config, "layer_types", None) or [FULL_ATTENTION] * len(layers))[: len(layers)]
    crossing = [type(part).__name__ for part in generating_parts(model)[1:] if shares_cross_attention(part)]
    if crossing:
        raise ValueError(f"model: {crossing[0]} keeps what it attends to across in the layers of its own tokens")
    if getattr(config, "kv_lora_rank", None):
        types = [LATENT_ATTENTION if kind == FULL_ATTENTION else kind for kind in types]
    for i in getattr(config, "cross_attention_layers", None) or ():
        types[i] = CROSS_ATTENTION
    kinds = []
    for i, (kind, layer) in enumerate(zip(types, layers, strict=True)):
        reason = reason_of(kind, layer)
        kinds.append(LayerKind(i, kind_name(kind, layer), reason, reason is None or bool(layer.is_compileable)))
    return kinds


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
    if type(layer).__name__ == "DummyLayer":
        return f"{layer_type}: holds no keys and values of its own"
    return None if type(layer).__name__ == "DynamicLayer" else f"{kind_name(layer_type, layer)}: {kept}"


def signature_of(model: nn.Module) -> tuple:
    """What a cache must agree on with a model: layers, dtype, and KV heads and head_dim of the first full-attention layer."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or []
    full = types.index(FULL_ATTENTION) if FULL_ATTENTION in types else 0
    layer = config.per_layer_config[full] if config.is_heterogeneous else config
    heads = getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", None)
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return (config.num_hidden_layers, heads, head_dim, str(model.dtype))


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


def resolve_compile(mode: str, model: nn.Module) -> tuple[str | None, str]:
    """Inner compiler (None: decode is not compiled) and why."""
    if mode == "none":
        return None, "compile='none'"
    if mode != "auto":
        return mode, f"compile={mode!r}"
    if model.device.type != "cpu":
        return "inductor", f"auto: there is an accelerator ({model.device.type})"
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if compiler:
        return "inductor", f"auto: there is a C++ compiler ({compiler})"
    return "eager", "auto: neither an accelerator nor a C++ compiler; the rewritten graph runs eagerly"


def compile_config_of(session: Session) -> CompileConfig | None:
    """The config that makes generate compile decode with our backend."""
    if session.inner is None:
        return None
    graphs = session.graphs
    backend = make_backend(graphs.append, inner=session.inner, strict=session.config.strict)
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def generating_parts(model: nn.Module) -> list[nn.Module]:
    """The model, and the models inside of it that its own kind of generate may hand the cache to."""
    if type(model).generate is GenerationMixin.generate:
        return [model]
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def watch_forward(model: nn.Module, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a generating part: tell a packed cache what is coming; nothing for any other cache."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, CompactedCache) or (torch.compiler.is_compiling() and cache.is_filled):
        return
    if part is not model and cache.is_told:
        return
    announce(model, part, cache, args, kwargs)
    if not torch.compiler.is_compiling():
        start_watching(cache)


def end_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook, called after errors too: stop watching, and say which layers were not seen."""
    cache = kwargs.get("past_key_values")
    if torch.compiler.is_compiling() or not isinstance(cache, CompactedCache):
        return
    stop_watching(cache)
    unseen = cache.unsettled() if cache.is_filled else []
    if unseen:
        session = session_of(model)
        text = f"layers {', '.join(map(str, unseen))}: no scaled_dot_product_attention was seen; every token is kept and read"
        if session is not None and session.config.strict:
            raise StrictError(f"strict: {text}")
        cache.note(text)


@torch.compiler.disable
def announce(model: nn.Module, part: nn.Module, cache: CompactedCache, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Check that a cache belongs to the model, calibrate on its first prompt if nothing else did, and pass on modalities."""
    if cache.signature != signature_of(model):
        raise ValueError(
            f"past_key_values: a cache for {describe(cache.signature)} was passed to a model with {describe(signature_of(model))}"
        )
    inputs = {**kwargs, **({"input_ids": args[0]} if args else {})}
    states = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if states is None or states.shape[1] == 0:
        raise ValueError("input_ids: the prompt has zero tokens; pass at least one")
    session = session_of(model)
    if session is not None and session.needs_calibration() and cache.planner is not None:
        session.calibrate(part, inputs, "the first request")
    if inputs.get("input_ids") is None:
        cache.note("inputs_embeds without input_ids: vision positions unknown, all tokens taken as text")
    # A single token is a generated one, whatever its id: no picture is that small.
    vision = vision_of(model.config, inputs) if states.shape[1] > 1 else None
    cache.expect(vision, padding_of(inputs, states.shape[1], int(cache.get_seq_length())))


def describe(signature: tuple) -> str:
    """A signature in words."""
    layers, heads, head_dim, dtype = signature
    return f"{layers} layers, {heads} KV heads x {head_dim}, {dtype}"
