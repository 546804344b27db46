"""optimize, restore, calibrate, plan_for, new_cache, largest_batch, read, load_prefix, report."""

import os
import types
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, overload

from torch import fx, nn
from torch.export import ExportedProgram

from apack_compile.backend.graph_log import GraphLog
from apack_compile.backend.graph_report import GraphReport, build_graph_report
from apack_compile.cache.cache import CompactedCache
from apack_compile.calibration.inputs import checked_inputs, limited
from apack_compile.capacity import cache_bytes
from apack_compile.config import AttentionPackConfig
from apack_compile.export.program import optimize_program
from apack_compile.export.report import ProgramReport, program_report
from apack_compile.generate.decode_step import DecodeSteps
from apack_compile.generate.generation import compiled_call, generate, is_packed_generate, keeping_the_cache
from apack_compile.generate.hooks import install_hooks, watch_rotary
from apack_compile.generate.new_session import new_session
from apack_compile.generate.prefix import Prefix, load, model_that_reads, read_prefix
from apack_compile.generate.quantize import quantize_language_model
from apack_compile.generate.ranks_report import RanksReport, gathered
from apack_compile.generate.reporting import Report, build_report
from apack_compile.generate.session import ATTRIBUTE, DEFAULT_NEW_TOKENS, Session, session_of
from apack_compile.models.continuous_batching import ENTRANCES, refuse_continuous_batching
from apack_compile.models.parts import generating_parts
from apack_compile.models.wrappers import inner_model, prepares_otherwise, unwrapped
from apack_compile.plan.plan import Plan

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
    session = new_session(model, config, plan)
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


def calibrate(
    model: nn.Module, inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, tokens: int | None = None
) -> nn.Module:
    """Fit the bases that all requests share to inputs of the model, one dictionary or several; returns the model.

    A dictionary has torch tensors on the model's device: input_ids `[B, T]`, or inputs_embeds `[B, T, hidden]`, and what goes with them.

    - `tokens`: read no more than about so many, padding included; the last input is cut, or read whole where it has pictures.
    - It takes the memory of one input's dense cache and of sums that do not grow with the inputs. A bar shows progress from the
      second second on (`transformers.utils.logging.disable_progress_bar()` hides it).
    - Where it ends early (an error, an interrupt), the model keeps what was calibrated before.
    - Raises ValueError when the model is not optimized or was optimized with a plan, and for inputs that it cannot read or that
      have no usable token.
    """
    given, model = model, unwrapped(model)
    session = _require_session(model)
    if session.plan is not None:
        raise ValueError(
            "model: optimized with a plan, which has its bases; call optimize(model, ratio=...) before calibrate"
        )
    session.calibrate(model, limited(model, checked_inputs(model, inputs), tokens), "calibrate")
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
    _check_prompt(tokens, vision_share)
    return session.source.whole_plan(tokens, float(vision_share))


def new_cache(model: nn.Module, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> CompactedCache:
    """An empty packed cache of an optimized model; it grows past `max_new_tokens` when it must.

    To pass as `cache=` (`past_key_values=` before transformers 5.24). Raises ValueError for a bad argument, or a model not optimized.
    """
    model = unwrapped(model)
    session = _require_session(model)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer >= 0")
    return session.new_cache(model, max_new_tokens)


def largest_batch(model: nn.Module, tokens: int, budget_bytes: int, vision_share: float = 0.0) -> int:
    """How many prompts of `tokens` tokens, `vision_share` of them vision, fit in `budget_bytes` in one packed cache.

    Everything is counted that a cache of `new_cache(model)` holds after the prompt: codes, dense tokens, positions, free slots, and the
    bases once for all. Vision tokens are taken to come behind the first four tokens.

    Raises ValueError for a bad argument (also more tokens than both 2^20 and the model's positions), a model that is not optimized, and
    where the number of tokens does not say what a cache holds (layers that are not packed, presets that drop tokens), RuntimeError where
    calibration is still to come.
    """
    model = unwrapped(model)
    session = _require_session(model)
    _check_prompt(tokens, vision_share)
    if not isinstance(budget_bytes, int) or isinstance(budget_bytes, bool) or budget_bytes < 0:
        raise ValueError(f"budget_bytes={budget_bytes!r} must be an integer >= 0")
    return cache_bytes(model, session, tokens, float(vision_share)).requests_in(budget_bytes)


def read(model: nn.Module, **inputs: Any) -> Prefix:
    """Read one prompt, packed, to generate many continuations of it: its inputs, `input_ids` `[1, P]` with pictures and all.

    Raises ValueError for a model that is not optimized, or whose preset lets no rows share tokens, and for inputs that are not one
    prompt without padding.
    """
    model = model_that_reads(model)
    return read_prefix(model, _require_session(model), inputs)


def load_prefix(model: nn.Module, path: str | os.PathLike) -> Prefix:
    """The prefix that `Prefix.save` wrote, mapped into memory; nothing is encoded anew.

    Raises OSError where it cannot be read, and ValueError for a file that is not a whole prefix, or one that another model, dtype or plan
    made.
    """
    model = model_that_reads(model)
    return load(model, _require_session(model), path)


@overload
def report(model: GraphLog) -> GraphReport: ...
@overload
def report(model: nn.Module, *, all_ranks: Literal[True]) -> RanksReport: ...
@overload
def report(model: nn.Module | ExportedProgram) -> Any: ...
def report(
    model: nn.Module | ExportedProgram | GraphLog, *, all_ranks: bool = False
) -> Report | RanksReport | ProgramReport | GraphReport:
    """What was rewritten, what was not and why, and the stored bytes; prints as a table.

    Of an optimized model, its Report; of a program, its ProgramReport. For a `torch.compile` of any other module, pass the
    GraphLog that was given as its option `log`.

    - `all_ranks`: the RanksReport of all processes that share the model (tensor parallelism), else of all that torch.distributed
      started; every one of them must call it. Raises ValueError for anything but an optimized model.
    """
    if all_ranks and isinstance(model, (GraphLog, ExportedProgram, fx.GraphModule)):
        raise ValueError("all_ranks: is for models; a program or GraphLog belongs to one process")
    if isinstance(model, GraphLog):
        return build_graph_report(model)
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        return program_report(model)
    model = unwrapped(model)
    own_log = ", or, for a torch.compile with backend='attentionpack', pass report the GraphLog of its option log"
    built = build_report(model, _require_session(model, otherwise=own_log))
    return gathered(model, built) if all_ranks else built


def _check_prompt(tokens: Any, vision_share: Any) -> None:
    """Raise ValueError for what is no length of a prompt, or no share of it."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be an integer >= 1")
    if not isinstance(vision_share, (int, float)) or isinstance(vision_share, bool) or not 0 <= vision_share <= 1:
        raise ValueError(f"vision_share={vision_share!r} must be a number from 0 to 1")


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


def _install(model: nn.Module, session: Session) -> None:
    """Put a session on a model: its generate, its hooks, its compiled decode steps."""
    if session.inner is not None:
        session.decode = DecodeSteps(session.inner, session.config.strict)
    for part in generating_parts(model):
        vars(part)["get_compiled_call"] = partial(compiled_call, model, part)
        for name in ENTRANCES:
            vars(part)[name] = partial(refuse_continuous_batching, name)
        prepare = getattr(type(part), "prepare_inputs_for_generation", None)
        if prepare is not None and not prepares_otherwise(part):
            vars(part)["prepare_inputs_for_generation"] = types.MethodType(keeping_the_cache(prepare), part)
    session.replaced = {name: vars(model)[name] for name in ("generate",) if name in vars(model)}
    # Before all else, so that pickling meets it first: what transformers puts on a model that ran cannot be pickled either.
    object.__setattr__(model, "__dict__", {ATTRIBUTE: session, **vars(model)})
    vars(model)["generate"] = types.MethodType(generate, model)
    install_hooks(model)


def _require_session(model: nn.Module, otherwise: str = "") -> Session:
    session = session_of(model) if isinstance(model, nn.Module) else None
    if session is None:
        raise ValueError(
            f"model: this {type(model).__name__} is not optimized; call apack_compile.optimize(model) first{otherwise}{inner_model(model)}"
        )
    return session
