"""What `optimize` asks of a model and of its arguments before it changes anything."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import GenerationMixin

from apack_compile.backend.inner_compiler import resolve_compile
from apack_compile.cache.layer_kinds import LayerKind, layer_kinds, planned_kinds
from apack_compile.config import AttentionPackConfig
from apack_compile.generate.preset_windows import without_small_windows
from apack_compile.generate.session import Session
from apack_compile.models.offload import check_one_device, computing_device, is_offloaded
from apack_compile.models.wrappers import adapters_of, inner_model
from apack_compile.plan.bits import largest_ratio
from apack_compile.plan.check import check_plan
from apack_compile.plan.plan import Plan
from apack_compile.plan.ranks import Ranks, check_all_layers, ranks_of
from apack_compile.plan.signature import describe, kv_heads, signature_of
from apack_compile.plan.source import PlanSource


def new_session(model: nn.Module, config: AttentionPackConfig, plan: Plan | None) -> Session:
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
    check_one_device(model)
    check_all_layers(model)
    kinds = layer_kinds(model) if plan is None else planned_kinds(layer_kinds(model), plan)
    can_be_packed = [kind.layer for kind in kinds if kind.reason is None]
    if config.preset is not None and plan is None:
        widths = {layer: math.prod(kv_heads(model, layer)) for layer in can_be_packed}
        kinds = without_small_windows(kinds, config, widths)
    if not any(kind.reason is None for kind in kinds):
        reasons = "; ".join(dict.fromkeys(str(kind.reason) for kind in kinds))
        raise ValueError(f"model: none of its {len(kinds)} layers can be packed ({reasons})")
    signature, device, ranks = signature_of(model), computing_device(model), ranks_of(model)
    layers = layers_by_window(kinds)
    source = PlanSource(layers=layers, signature=signature, device=device, ranks=ranks, asked=config.to_json())
    if plan is not None:
        check_plan_fits(plan, signature, kinds, ranks)
        source = replace(source, given=plan.to(device))
    elif config.ratio is not None:
        check_ratio(config.ratio, config.head_groups or 1, signature)
        source = replace(
            source, ratio=config.ratio, coarse=config.coarse, planned_device=config.planned_device, prefer=config.prefer
        )
    else:
        wanted = {window: config.wanted(those, window, can_be_packed) for window, those in layers.items()}
        plans = {window: config.preset_options.plan(wanted[window]) for window in layers}
        # in a window a token is gone soon: nothing is evicted, and all of it is read
        plans = {window: plan if window is None else replace(plan, tiers=None) for window, plan in plans.items()}
        source = replace(source, presets=plans)
    return Session(config, kinds, source, adapters_of(model), *resolve_compile(config.compile, device.type))


def layers_by_window(kinds: Sequence[LayerKind]) -> dict[int | None, list[int]]:
    """Indices of the packed layers that see so many of the newest tokens, all first."""
    packed = [kind for kind in kinds if kind.reason is None]
    windows = sorted(dict.fromkeys(kind.window for kind in packed), key=lambda window: window is not None)
    return {window: [kind.layer for kind in packed if kind.window == window] for window in windows}


def check_plan_fits(plan: Plan, signature: tuple, kinds: list[LayerKind], ranks: Ranks) -> None:
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


def check_ratio(ratio: float, groups: int, signature: tuple) -> None:
    """Raise ValueError for a ratio that no plan can reach, and for head groups that do not divide the KV heads."""
    _, heads, head_dim, _ = signature
    if heads % groups:
        raise ValueError(f"head_groups={groups} must divide the model's {heads} KV heads")
    reachable = largest_ratio(heads // groups * head_dim)
    if ratio > reachable:
        raise ValueError(
            f"ratio={ratio!r} is out of reach: the largest for KV width {heads // groups * head_dim} is {reachable:.1f}"
        )
