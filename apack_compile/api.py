"""optimize, restore, calibrate, plan_for, new_cache, report."""

import types
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from apack_compile import quantize as quantization
from apack_compile.cache import CompactedCache
from apack_compile.config import AttentionPackConfig
from apack_compile.plan import Plan
from apack_compile.plan_check import check_plan
from apack_compile.reporting import Report, build_report
from apack_compile.session import (
    ATTRIBUTE,
    Session,
    check_ratio,
    compile_config_of,
    describe,
    end_forward,
    generating_parts,
    layer_kinds,
    resolve_compile,
    session_of,
    signature_of,
    watch_forward,
)

DEFAULT_NEW_TOKENS = 64


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
    min_tokens: int | None = None,
) -> nn.Module:
    """Make `model.generate` use a packed KV cache; returns the same model.

    Pass a config, or its fields; or, instead of ratio and preset, a plan that serves every prompt. A generate call of fewer than
    `min_tokens` tokens (prompt and new ones) keeps transformers' own cache. `quantize` is a torchao config
    or its short name ("int8wo"). A second call replaces the first, except for what was calibrated: that belongs to the model, its
    key_block and head_groups. A call that raises (ValueError, ImportError) leaves it as it was.
    """
    if plan is not None:
        _check_choice(plan, config=config, ratio=ratio, preset=preset)
    if config is None:
        name = quantize if isinstance(quantize, str) else None
        config = AttentionPackConfig(
            ratio=ratio, preset=preset, quantize=name, compile=compile, strict=strict, min_tokens=min_tokens
        )
    elif not isinstance(config, AttentionPackConfig):
        raise ValueError(f"config={config!r} must be an AttentionPackConfig")
    elif (ratio, preset, quantize, compile, strict, min_tokens) != (None, None, None, "auto", False, None):
        raise ValueError("config: pass either a config or the keyword arguments, not both")
    quantize = quantize if quantize is not None else config.quantize
    session = _new_session(model, config, plan)
    previous = session_of(model)
    if previous is not None and previous.calibrates_like(session):
        for name in ("statistics", "rules", "turn", "turn_reason", "calibrated_on"):
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
        for name in (ATTRIBUTE, "generate", "_compiled_call", "_last_compile_config"):
            vars(model).pop(name, None)
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
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be an integer >= 1")
    if not isinstance(vision_share, (int, float)) or isinstance(vision_share, bool) or not 0 <= vision_share <= 1:
        raise ValueError(f"vision_share={vision_share!r} must be a number from 0 to 1")
    return session.plan_for(tokens, float(vision_share))


def new_cache(model: nn.Module, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> CompactedCache:
    """An empty packed cache of an optimized model, to pass as `past_key_values=`; it grows past `max_new_tokens` when it must."""
    session = _require_session(model)
    cache = session.new_cache(model.config, max_new_tokens)
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
    """Put a session on a model: its generate, its hook, its compile config."""
    session.compile_config = compile_config_of(session)
    parts = generating_parts(model)
    session.hooks = (
        *(part.register_forward_pre_hook(partial(watch_forward, model), with_kwargs=True) for part in parts),
        model.register_forward_hook(end_forward, with_kwargs=True, always_call=True),
    )
    vars(model)[ATTRIBUTE] = session
    vars(model)["generate"] = types.MethodType(_generate, model)


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
    settings = kwargs.get("generation_config") or model.generation_config
    cache = kwargs.get("past_key_values")
    chosen = (kwargs.get(name, getattr(settings, name, None)) for name in ("use_cache", "cache_implementation"))
    use_cache, implementation = chosen
    if cache is None and (use_cache is False or implementation is not None):
        session.unused = "use_cache=False" if use_cache is False else f"cache_implementation={implementation!r}"
        return plain(model, *args, **kwargs)
    if cache is None:
        prompt = _prompt_length(args, kwargs)
        _check_length(model, prompt)
        new_tokens = _new_tokens(kwargs, settings, prompt)
        session.unused = session.too_short(prompt, new_tokens, model.device.type)
        if session.unused:
            return plain(model, *args, **kwargs)
        cache = kwargs["past_key_values"] = new_cache(model, new_tokens)
    session.unused = None if isinstance(cache, CompactedCache) else f"past_key_values is a {type(cache).__name__}"
    if session.unused:
        return plain(model, *args, **kwargs)
    own_compile = kwargs.get("compile_config") or getattr(settings, "compile_config", None)
    if session.inner is None:
        kwargs.setdefault("disable_compile", True)
    elif cache.is_compileable and own_compile is None:
        kwargs["compile_config"] = session.compile_config
    out = plain(model, *args, **kwargs)
    session.remember(cache)
    return out


def _prompt_length(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """Tokens of the prompt, None when the inputs do not tell."""
    inputs = (
        args[0] if args else next((kwargs[n] for n in ("input_ids", "inputs", "inputs_embeds") if n in kwargs), None)
    )
    return inputs.shape[1] if isinstance(inputs, torch.Tensor) and inputs.dim() >= 2 else None


def _check_length(model: nn.Module, prompt: int | None) -> None:
    """Raise ValueError for a prompt that the model cannot read."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if prompt == 0:
        raise ValueError("input_ids: the prompt has zero tokens; pass at least one")
    if prompt is not None and limit is not None and prompt > limit:
        raise ValueError(f"input_ids: the prompt has {prompt} tokens; the model's positions end at {limit}")


def _new_tokens(kwargs: Mapping[str, Any], settings: Any, prompt: int | None) -> int:
    """New tokens to expect of a generate call."""
    new_tokens = kwargs.get("max_new_tokens") or getattr(settings, "max_new_tokens", None)
    longest = kwargs.get("max_length") or getattr(settings, "max_length", None)
    if new_tokens is None and longest is not None and prompt is not None:
        new_tokens = longest - prompt
    return max(int(new_tokens or DEFAULT_NEW_TOKENS), 1)
