"""optimize, restore, calibrate, plan_for, new_cache, report."""

import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from apack_compile import quantize as quantization
from apack_compile.cache import CompactedCache
from apack_compile.config import AttentionPackConfig
from apack_compile.decode_step import DecodeSteps
from apack_compile.modality import padding_of, vision_of
from apack_compile.plan import Plan
from apack_compile.plan_check import check_plan
from apack_compile.reporting import Report, build_report
from apack_compile.session import (
    ATTRIBUTE,
    Session,
    check_ratio,
    describe,
    end_forward,
    generating_parts,
    layer_kinds,
    note_new_weights,
    resolve_compile,
    session_of,
    signature_of,
    watch_forward,
)

DEFAULT_NEW_TOKENS = 64
# What optimize, and generate after it, put on a model.
OWN_ATTRIBUTES = (
    ATTRIBUTE,
    "generate",
    "get_compiled_call",
    "init_continuous_batching",
    "_compiled_call",
    "_last_compile_config",
)


def optimize(
    model: nn.Module,
    config: AttentionPackConfig | None = None,
    *,
    ratio: float | None = None,
    preset: str | None = None,
    plan: Plan | None = None,
    quantize: Any = None,
    compile: str = "auto",
    strict: bool = False,
) -> nn.Module:
    """Make `model.generate` use a packed KV cache; returns the same model.

    Pass a config, or its fields; or, instead of ratio and preset, a plan that serves every prompt. `quantize` is a torchao config
    or its short name ("int8wo"). A second call replaces the first, except for what was calibrated: that belongs to the model, its
    key_block and head_groups. A call that raises (ValueError, ImportError) leaves it as it was.
    """
    if plan is not None:
        _check_choice(plan, config=config, ratio=ratio, preset=preset)
    if config is None:
        name = quantize if isinstance(quantize, str) else None
        config = AttentionPackConfig(ratio=ratio, preset=preset, quantize=name, compile=compile, strict=strict)
    elif not isinstance(config, AttentionPackConfig):
        raise ValueError(f"config={config!r} must be an AttentionPackConfig")
    elif (ratio, preset, quantize, compile, strict) != (None, None, None, "auto", False):
        raise ValueError("config: pass either a config or the keyword arguments, not both")
    quantize = quantize if quantize is not None else config.quantize
    session = _new_session(model, config, plan)
    previous = session_of(model)
    if previous is not None and previous.calibrates_like(session):
        for name in ("statistics", "rules", "turn", "turn_reason", "calibrated_on", "outdated"):
            setattr(session, name, getattr(previous, name))
    if quantize is not None:
        torchao_config = quantization.resolve(quantize)
        if previous is not None and previous.quantized:
            raise ValueError(f"quantize={quantize!r}: the model's weights are quantized already")
        session.quantized = quantization.quantize_language_model(model, torchao_config)
    elif previous is not None:
        session.quantized = previous.quantized
    restore(model)
    _install(model, session)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize` (quantized weights stay quantized); returns the same model."""
    session = session_of(model)
    if session is not None:
        for hook in session.hooks:
            hook.remove()
        for part in generating_parts(model):
            for name in OWN_ATTRIBUTES:
                vars(part).pop(name, None)
    return model


def calibrate(model: nn.Module, inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> nn.Module:
    """Fit the bases that all requests share on model inputs (one dictionary or several); returns the model.

    Raises ValueError when the model is not optimized, was optimized with a plan, or no input has a usable token.
    """
    session = _require_session(model)
    if session.plan is not None:
        raise ValueError(
            "model: optimized with a plan, which has its bases; call optimize(model, ratio=...) before calibrate"
        )
    session.calibrate(model, inputs, "calibrate")
    return model


def plan_for(model: nn.Module, tokens: int, vision_share: float = 0.0) -> Plan:
    """The plan that an optimized model uses for a prompt of `tokens` tokens, `vision_share` of them vision.

    Raises ValueError for a bad argument or a model that is not optimized, RuntimeError where calibration is still to come.
    """
    session = _require_session(model)
    session.follow(model)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be an integer >= 1")
    if not isinstance(vision_share, (int, float)) or isinstance(vision_share, bool) or not 0 <= vision_share <= 1:
        raise ValueError(f"vision_share={vision_share!r} must be a number from 0 to 1")
    return session.plan_for(tokens, float(vision_share))


def new_cache(model: nn.Module, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> CompactedCache:
    """An empty packed cache of an optimized model, to pass as `past_key_values=`; it grows past `max_new_tokens` when it must."""
    session = _require_session(model)
    cache = session.new_cache(model, max_new_tokens)
    session.last_cache = weakref.ref(cache)
    return cache


def report(model: nn.Module) -> Report:
    """What was rewritten, what was not and why, and the bytes of the last cache; prints as a table."""
    return build_report(model, _require_session(model))


def _check_choice(plan: Any, **others: Any) -> None:
    """Raise ValueError for what is no plan, and for a plan next to another way to say what streams get."""
    if not isinstance(plan, Plan):
        raise ValueError(f"plan={plan!r} must be a Plan; Plan.load(path) reads one")
    given = ", ".join(f"{name}={value!r}" for name, value in others.items() if value is not None)
    if given:
        raise ValueError(f"plan and {given} exclude each other; pass one of them")


def _new_session(model: nn.Module, config: AttentionPackConfig, plan: Plan | None) -> Session:
    """A session for a model that can be optimized; raises ValueError for one that cannot."""
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise ValueError(f"model: {type(model).__name__} has no generate(); pass a transformers generation model")
    if not isinstance(model, GenerationMixin):
        raise ValueError(
            f"model: {type(model).__name__} has a generate() of its own, not transformers' GenerationMixin"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: weights are on the meta device; load them first")
    kinds = layer_kinds(model)
    if not any(kind.reason is None for kind in kinds):
        reasons = "; ".join(dict.fromkeys(str(kind.reason) for kind in kinds))
        raise ValueError(f"model: none of its {len(kinds)} layers can be packed ({reasons})")
    signature = signature_of(model)
    packed = [kind.layer for kind in kinds if kind.reason is None]
    if plan is not None:
        _check_plan_fits(plan, signature, packed)
        plan = plan.to(model.device)
    elif config.ratio is not None:
        check_ratio(config.ratio, config.head_groups, model)
    inner, reason = resolve_compile(config.compile, model)
    return Session(config, kinds, signature, inner, reason, plan)


def _check_plan_fits(plan: Plan, signature: tuple, packed: list[int]) -> None:
    """Raise ValueError for a plan that is not one for this model."""
    check_plan(plan, "plan")
    if plan.signature != signature:
        raise ValueError(f"plan: made for {describe(plan.signature)}; the model has {describe(signature)}")
    if sorted(plan.layers) != packed:
        raise ValueError(f"plan: packs the layers {sorted(plan.layers)}; of this model {packed} are packed")


def _install(model: nn.Module, session: Session) -> None:
    """Put a session on a model: its generate, its hooks, its compiled decode steps."""
    if session.inner is not None:
        session.decode = DecodeSteps(session.inner, session.config.strict)
    parts = generating_parts(model)
    session.hooks = (
        *(part.register_forward_pre_hook(partial(watch_forward, model), with_kwargs=True) for part in parts),
        model.register_forward_hook(end_forward, with_kwargs=True, always_call=True),
        model.register_load_state_dict_post_hook(note_new_weights),
    )
    for part in parts:
        vars(part)["get_compiled_call"] = partial(_compiled_call, model, part)
        vars(part)["init_continuous_batching"] = partial(_refuse_continuous_batching, "init_continuous_batching")
    vars(model)[ATTRIBUTE] = session
    vars(model)["generate"] = types.MethodType(_generate, model)


def _compiled_call(model: nn.Module, part: nn.Module, compile_config: Any) -> Callable:
    """What generate calls in place of a generating part of the model: our decode steps, unless the caller has a config of his own."""
    decode = session_of(model).decode
    stock = type(part).get_compiled_call(part, compile_config)
    # transformers leaves some models uncompiled; a copied config has the same backend
    ours = decode is not None and compile_config is not None and compile_config.backend is decode.config.backend
    return partial(decode.run, part) if ours and stock != part.__call__ else stock


def _refuse_continuous_batching(what: str, *_: Any, **__: Any) -> None:
    raise ValueError(
        f"{what}: continuous batching keeps its requests in a paged dense cache of its own, which cannot be packed; "
        "call generate with a batch of prompts, or apack_compile.restore(model) first"
    )


def _require_session(model: nn.Module) -> Session:
    session = session_of(model)
    if session is None:
        raise ValueError(
            f"model: this {type(model).__name__} is not optimized; call apack_compile.optimize(model) first"
        )
    return session


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """transformers' generate with a packed cache, unless the caller chose another cache or none."""
    plain = type(model).generate
    session = session_of(model)
    options = _Options(args, kwargs, model.generation_config)
    cache = kwargs.get("past_key_values")
    implementation = options.get("cache_implementation")
    _check_mode(options, implementation)
    if cache is None and (options.get("use_cache") is False or implementation is not None):
        session.unused = f"cache_implementation={implementation!r}" if implementation else "use_cache=False"
        return plain(model, *args, **kwargs)
    prompt = _prompt_of(args, kwargs)
    if cache is None:
        _check_length(model, prompt)
        cache = kwargs["past_key_values"] = new_cache(model, _new_tokens(options, prompt))
    session.unused = None if isinstance(cache, CompactedCache) else f"past_key_values is a {type(cache).__name__}"
    if session.unused:
        return plain(model, *args, **kwargs)
    if options.get("prefill_chunk_size") is not None and not cache.is_filled:
        _plan_chunks(model, session, cache, kwargs, prompt)
    if options.get("guidance_scale") not in (None, 1, 1.0):
        cache.note("guidance_scale: the unguided pass of each step keeps a dense cache of its own")
    drafts = bool(getattr(options.config, "is_assistant", False))
    if drafts:
        cache.activate_past_recording()
    if session.inner is None:
        kwargs.setdefault("disable_compile", True)
    elif cache.is_compileable and options.get("compile_config") is None:
        kwargs["compile_config"] = session.decode.config
    cache.prompt_end = _prompt_end(kwargs, prompt, int(cache.get_seq_length()) if drafts else 0)
    try:
        out = plain(model, *args, **kwargs)
    finally:
        cache.prompt_end = None
    session.remember(cache)
    return out


@dataclass(frozen=True)
class _Options:
    """What a generate call asks for: its keyword arguments, then its generation config."""

    args: tuple
    kwargs: Mapping[str, Any]
    default: Any

    @property
    def config(self) -> Any:
        given = self.kwargs.get("generation_config") or (self.args[1] if len(self.args) > 1 else None)
        return given or self.default

    def get(self, name: str) -> Any:
        return self.kwargs.get(name, getattr(self.config, name, None))


def _check_mode(options: _Options, implementation: str | None) -> None:
    """Raise ValueError for a way to generate that would not use the packed cache without saying so."""
    if implementation == "paged":
        _refuse_continuous_batching("cache_implementation='paged'")
    if options.get("assistant_early_exit") is not None:
        raise ValueError(
            f"assistant_early_exit={options.get('assistant_early_exit')!r}: drafts come from the model with fewer layers, whose "
            "cache would not be this model's; pass assistant_model= or prompt_lookup_num_tokens="
        )


def _plan_chunks(
    model: nn.Module, session: Session, cache: CompactedCache, kwargs: Mapping[str, Any], prompt: torch.Tensor | None
) -> None:
    """Choose the plan for a whole prompt that is read in chunks; raises ValueError where a chunk would have to calibrate."""
    if cache.planner is None or prompt is None:
        return
    if session.needs_calibration():
        raise ValueError(
            f"prefill_chunk_size: with ratio={session.ratio:g} the first chunk would be all that bases are calibrated on; "
            "call apack_compile.calibrate(model, inputs) first"
        )
    vision, padding = vision_of(model.config, {"input_ids": prompt}), padding_of(kwargs, prompt.shape[1])
    real = torch.ones(prompt.shape[:2], dtype=torch.bool) if padding is None else ~padding.cpu()
    share = 0.0 if vision is None else float((vision.cpu() & real).sum() / real.sum().clamp_min(1))
    cache.plan_for_prompt(prompt.shape[1], share)


def _prompt_of(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Token ids or embeddings of the prompt, None when the inputs do not tell."""
    given = (args[0] if args else None, *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
    found = next((x for x in given if x is not None), None)
    return found if isinstance(found, torch.Tensor) and found.dim() >= 2 else None


def _prompt_end(kwargs: Mapping[str, Any], prompt: torch.Tensor | None, drafted_from: int) -> int | None:
    """Position where the prompt ends, None when the inputs do not tell; an assistant's own ends where its cache did before."""
    mask = kwargs.get("attention_mask")
    end = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else _length(prompt)
    return drafted_from or end


def _length(prompt: torch.Tensor | None) -> int | None:
    """Tokens of the prompt."""
    return None if prompt is None else prompt.shape[1]


def _check_length(model: nn.Module, prompt: torch.Tensor | None) -> None:
    """Raise ValueError for a prompt that the model cannot read."""
    limit, length = (
        getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None),
        _length(prompt),
    )
    if length == 0:
        raise ValueError("input_ids: the prompt has zero tokens; pass at least one")
    if length is not None and limit is not None and length > limit:
        raise ValueError(f"input_ids: the prompt has {length} tokens; the model's positions end at {limit}")


def _new_tokens(options: _Options, prompt: torch.Tensor | None) -> int:
    """New tokens to expect of a generate call."""
    new_tokens, longest = options.get("max_new_tokens"), options.get("max_length")
    if new_tokens is None and longest is not None and prompt is not None:
        new_tokens = longest - prompt.shape[1]
    return max(int(new_tokens or DEFAULT_NEW_TOKENS), 1)
