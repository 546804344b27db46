"""optimize, restore, calibrate, plan_for, new_cache, report."""

import math
import types
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, overload

from torch import fx, nn
from torch.export import ExportedProgram
from transformers import GenerationMixin

from apack_compile.backend.graph_log import GraphLog
from apack_compile.backend.graph_report import GraphReport, build_graph_report
from apack_compile.backend.inner_compiler import resolve_compile
from apack_compile.cache.cache import CompactedCache, LayerKind
from apack_compile.calibration.inputs import checked_inputs
from apack_compile.config import AttentionPackConfig
from apack_compile.export.program import optimize_program
from apack_compile.export.report import ProgramReport, program_report
from apack_compile.generate.decode_step import DecodeSteps
from apack_compile.generate.generation import compiled_call, generate, is_packed_generate, keeping_the_cache
from apack_compile.generate.preset_windows import without_small_windows
from apack_compile.generate.quantize import quantize_language_model
from apack_compile.generate.reporting import Report, build_report
from apack_compile.generate.session import (
    ATTRIBUTE,
    DEFAULT_NEW_TOKENS,
    Session,
    cache_users,
    check_ratio,
    describe,
    end_forward,
    generating_parts,
    kv_heads,
    layer_kinds,
    note_new_weights,
    planned_kinds,
    rename_cache,
    session_of,
    signature_of,
    watch_forward,
    watch_rotary,
)
from apack_compile.models.cache_argument import cache_name
from apack_compile.models.continuous_batching import ENTRANCES, refuse_continuous_batching
from apack_compile.models.offload import computing_device, is_offloaded
from apack_compile.models.wrappers import adapters_of, inner_model, prepares_otherwise, unwrapped
from apack_compile.plan.check import check_plan
from apack_compile.plan.plan import Plan
from apack_compile.plan.ranks import Ranks, ranks_of

# What optimize, and generate after it, put on a model.
OWN_ATTRIBUTES = (
    ATTRIBUTE,
    "get_compiled_call",
    *ENTRANCES,
    "prepare_inputs_for_generation",
    "_compiled_call",
    "_last_compile_config",
)


def optimize(
    model: nn.Module | ExportedProgram,
    config: AttentionPackConfig | None = None,
    *,
    ratio: float | None = None,
    preset: str | None = None,
    plan: Plan | None = None,
    quantize: Any = None,
    compile: str = "auto",
    strict: bool = False,
    min_tokens: int | None = None,
    calibration_inputs: Any = None,
) -> Any:
    """Make `model.generate` use a packed KV cache, and return the same model. Of a program, return one with packed cache buffers.

    For a model, give a config, or its fields, or a plan instead of ratio and preset: it is then used for every prompt.

    - `ratio`, `preset`, `compile`, `strict`, `min_tokens`: fields of `AttentionPackConfig`.
    - `quantize`: a torchao config, or its short name such as "int8wo", for the weights of the language model's linear layers.
    - A second call replaces the first, except for what was calibrated: that belongs to the model, its key_block and head_groups.
    - A call that raises (ValueError, ImportError) leaves the model as it was.
    - Of a PEFT model, and of one that torch.compile gave, the model inside is optimized. The other functions do the same.

    A program is a torch.export.ExportedProgram or fx.GraphModule. It takes ratio with calibration_inputs, or a plan, and strict.

    - `calibration_inputs`: one call of it, or a list of calls in order; each is a tuple of arguments or a dictionary of named ones.
    - The program does not change; the new one shares its weights.
    - Raises StrictError where strict is set and a cache stays dense.
    """
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        _check_program_choice(
            config=config,
            preset=preset,
            quantize=quantize,
            compile=None if compile == "auto" else compile,
            min_tokens=min_tokens,
        )
        return optimize_program(model, ratio, plan, calibration_inputs, strict)
    if calibration_inputs is not None:
        raise ValueError(
            "calibration_inputs: is for programs; call calibrate(model, inputs) for a model with generate()"
        )
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
    given, model = model, unwrapped(model)
    session = _new_session(model, config, plan)
    previous = session_of(model)
    if previous is not None:
        session.take_calibration(previous, model)
    if quantize is not None:
        quantize_language_model(model, quantize)
    restore(model)
    _install(model, session)
    return given


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize` and return the same model; quantized weights stay quantized. Raises ValueError if `model` is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {type(model).__name__} is no torch.nn.Module; pass the model that optimize was given")
    given, model = model, unwrapped(model)
    session = session_of(model)
    if session is not None:
        for hook in (*session.hooks, *session.rotary_hooks):
            hook.remove()
        for part in generating_parts(model):
            for name in OWN_ATTRIBUTES:
                if name != "prepare_inputs_for_generation" or not prepares_otherwise(part):
                    vars(part).pop(name, None)
        if is_packed_generate(vars(model).get("generate")):
            del vars(model)["generate"]
            vars(model).update(session.replaced)
    return given


def calibrate(model: nn.Module, inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> nn.Module:
    """Fit the bases that all requests share to inputs of the model, one dictionary or several; returns the model.

    A dictionary has torch tensors on the model's device: input_ids `[B, T]`, or inputs_embeds `[B, T, hidden]`, and what goes with them.
    Raises ValueError when the model is not optimized or was optimized with a plan, and for inputs that it cannot read or that have
    no usable token.
    """
    given, model = model, unwrapped(model)
    session = _require_session(model)
    if session.plan is not None:
        raise ValueError(
            "model: optimized with a plan, which has its bases; call optimize(model, ratio=...) before calibrate"
        )
    session.calibrate(model, checked_inputs(model, inputs), "calibrate")
    watch_rotary(model)
    return given


def plan_for(model: nn.Module, tokens: int, vision_share: float = 0.0) -> Plan:
    """The plan that an optimized model uses for a prompt of `tokens` tokens, `vision_share` of them vision.

    Where layers have windows, it holds a plan for the layers of each, for that window's tokens and the same share (`Plan.windows`).
    Raises ValueError for a bad argument or a model that is not optimized, RuntimeError where calibration is still to come.
    """
    model = unwrapped(model)
    session = _require_session(model)
    session.follow(model)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be an integer >= 1")
    if not isinstance(vision_share, (int, float)) or isinstance(vision_share, bool) or not 0 <= vision_share <= 1:
        raise ValueError(f"vision_share={vision_share!r} must be a number from 0 to 1")
    return session.whole_plan(tokens, float(vision_share))


def new_cache(model: nn.Module, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> CompactedCache:
    """An empty packed cache of an optimized model; it grows past `max_new_tokens` when it must.

    To pass as `cache=` (`past_key_values=` before transformers 5.24). Raises ValueError for a bad argument, or a model not optimized.
    """
    model = unwrapped(model)
    session = _require_session(model)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer >= 0")
    return session.new_cache(model, max_new_tokens)


@overload
def report(model: GraphLog) -> GraphReport: ...
@overload
def report(model: nn.Module | ExportedProgram) -> Any: ...
def report(model: nn.Module | ExportedProgram | GraphLog) -> Report | ProgramReport | GraphReport:
    """What was rewritten, what was not and why, and the stored bytes; prints as a table.

    Of an optimized model, its Report; of a program, its ProgramReport. For a `torch.compile` of any other module, pass the
    GraphLog that was given as its option `log`.
    """
    if isinstance(model, GraphLog):
        return build_graph_report(model)
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        return program_report(model)
    model = unwrapped(model)
    return build_report(model, _require_session(model))


def _check_program_choice(**others: Any) -> None:
    """Raise ValueError for what a program does not take."""
    given = ", ".join(f"{name}={value!r}" for name, value in others.items() if value is not None)
    if given:
        raise ValueError(f"{given}: a program takes ratio, plan, calibration_inputs and strict")


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
        inside = inner_model(model) or "; pass a transformers generation model"
        raise ValueError(f"model: {type(model).__name__} has no generate(){inside}")
    if not isinstance(model, GenerationMixin):
        raise ValueError(
            f"model: {type(model).__name__} has a generate() of its own, not transformers' GenerationMixin{inner_model(model)}"
        )
    if any(parameter.is_meta for parameter in model.parameters()) and not is_offloaded(model):
        raise ValueError("model: weights are on the meta device; load them first")
    kinds = layer_kinds(model) if plan is None else planned_kinds(layer_kinds(model), plan)
    can_be_packed = [kind.layer for kind in kinds if kind.reason is None]
    if config.preset is not None and plan is None:
        widths = {layer: math.prod(kv_heads(model, layer)) for layer in can_be_packed}
        kinds = without_small_windows(kinds, config, widths)
    if not any(kind.reason is None for kind in kinds):
        reasons = "; ".join(dict.fromkeys(str(kind.reason) for kind in kinds))
        raise ValueError(f"model: none of its {len(kinds)} layers can be packed ({reasons})")
    signature = signature_of(model)
    if plan is not None:
        _check_plan_fits(plan, signature, kinds, ranks_of(model))
        plan = plan.to(computing_device(model))
    elif config.ratio is not None:
        check_ratio(config.ratio, config.head_groups or 1, model)
    inner, reason = resolve_compile(config.compile, computing_device(model).type)
    adapters, ranks = adapters_of(model), ranks_of(model)
    return Session(config, kinds, signature, inner, reason, can_be_packed, plan, adapters=adapters, ranks=ranks)


def _check_plan_fits(plan: Plan, signature: tuple, kinds: list[LayerKind], ranks: Ranks) -> None:
    """Raise ValueError for a plan that is not one for this model."""
    check_plan(plan, "plan")
    if plan.ranks != ranks:
        raise ValueError(
            f"plan: made on {plan.ranks} of tensor parallelism; this model is on {ranks}: make a plan with as many ranks"
        )
    if plan.signature != signature:
        raise ValueError(f"plan: made for {describe(plan.signature)}; the model has {describe(signature)}")
    packed = [kind.layer for kind in kinds if kind.reason is None]
    if plan.every_layer != packed:
        raise ValueError(f"plan: packs the layers {plan.every_layer}; of this model {packed} are packed")
    for kind in (kind for kind in kinds if kind.reason is None):
        part = plan.of_layer(kind.layer)
        if part.window not in (None, kind.window):
            raise ValueError(
                f"plan: made for a window of {part.window} in layer {kind.layer}; the model's is {kind.window or 'without end'}"
            )
        if kind.window is not None and part.layers_place_tokens:
            raise ValueError(
                f"plan: orders the tokens of layer {kind.layer} by importance, but the layer has a window of {kind.window}; make the "
                "plan with this model"
            )


def _install(model: nn.Module, session: Session) -> None:
    """Put a session on a model: its generate, its hooks, its compiled decode steps."""
    if session.inner is not None:
        session.decode = DecodeSteps(session.inner, session.config.strict)
    parts, users = generating_parts(model), cache_users(model)
    session.hooks = (
        *(part.register_forward_pre_hook(partial(rename_cache, cache_name(part)), with_kwargs=True) for part in users),
        *(part.register_forward_pre_hook(partial(watch_forward, model), with_kwargs=True) for part in users),
        *(
            part.register_forward_hook(partial(end_forward, model), with_kwargs=True, always_call=True)
            for part in users
        ),
        model.register_load_state_dict_post_hook(note_new_weights),
    )
    for part in parts:
        vars(part)["get_compiled_call"] = partial(compiled_call, model, part)
        for name in ENTRANCES:
            vars(part)[name] = partial(refuse_continuous_batching, name)
        prepare = getattr(type(part), "prepare_inputs_for_generation", None)
        if prepare is not None and not prepares_otherwise(part):
            vars(part)["prepare_inputs_for_generation"] = types.MethodType(keeping_the_cache(prepare), part)
    session.replaced = {name: vars(model)[name] for name in ("generate",) if name in vars(model)}
    vars(model)[ATTRIBUTE] = session
    vars(model)["generate"] = types.MethodType(generate, model)
    watch_rotary(model)


def _require_session(model: nn.Module) -> Session:
    session = session_of(model) if isinstance(model, nn.Module) else None
    if session is None:
        raise ValueError(
            f"model: this {type(model).__name__} is not optimized; call apack_compile.optimize(model) first, or, for a torch.compile "
            f"with backend='attentionpack', pass report the GraphLog of its option log{inner_model(model)}"
        )
    return session
