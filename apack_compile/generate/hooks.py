"""What happens around each forward pass of an optimized model: a packed cache is told what comes, and asked what was stored."""

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from apack_compile.cache.cache import CompactedCache
from apack_compile.generate.first_request import begin, finish
from apack_compile.generate.session import Session, session_of
from apack_compile.models.cache_argument import cache_name, cache_of, named_arguments
from apack_compile.models.continuous_batching import refuse_paged_cache
from apack_compile.models.coordinates import positions_given, rotary_modules
from apack_compile.models.modality import padding_of, vision_of
from apack_compile.models.parts import cache_users, generating_parts
from apack_compile.plan.signature import describe, signature_of


def install_hooks(model: nn.Module) -> None:
    """See the forward passes of every part that may be called with the cache, and when weights are loaded."""
    users = cache_users(model)
    session_of(model).hooks = (
        *(part.register_forward_pre_hook(partial(rename_cache, cache_name(part)), with_kwargs=True) for part in users),
        *(part.register_forward_pre_hook(partial(watch_forward, model), with_kwargs=True) for part in users),
        *(
            part.register_forward_hook(partial(end_forward, model), with_kwargs=True, always_call=True)
            for part in users
        ),
        model.register_load_state_dict_post_hook(note_new_weights),
    )
    watch_rotary(model)


def rename_cache(
    name: str, part: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a part that takes a cache: a packed one given by another name than the part's own goes on under that one."""
    cache = cache_of((), kwargs)
    if not isinstance(cache, CompactedCache) or kwargs.get(name) is cache:
        return None
    return args, {**{key: x for key, x in kwargs.items() if x is not cache}, name: cache}


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
    announce(model, part, cache, args, kwargs, not compiling)
    if not compiling:
        note_call(model, part, cache, kwargs)
        begin_forward(session_of(model), part, cache)


@torch.compiler.disable
def announce(
    model: nn.Module,
    part: nn.Module,
    cache: CompactedCache,
    args: tuple,
    kwargs: Mapping[str, Any],
    is_eager: bool,
) -> None:
    """Check that a cache belongs to the model, see to plans for its first prompt, and pass on modalities."""
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
    if cache.groups.source is not None:
        prepare_plans(model, part if part in generating_parts(model) else model, cache, inputs, is_eager)
    if inputs.get("input_ids") is None:
        cache.note("inputs_embeds without input_ids: vision positions unknown, all tokens taken as text")
    # A single token is a generated one, whatever its id: no picture is that small.
    vision, held = vision_of(model.config, inputs) if states.shape[1] > 1 else None, int(cache.get_seq_length())
    if vision is not None and cache.groups.prompt_end is not None:
        vision[:, max(cache.groups.prompt_end - held, 0) :] = False
    cache.expect(vision, padding_of(inputs, states.shape[1], held))


def prepare_plans(
    model: nn.Module, runs: nn.Module, cache: CompactedCache, inputs: Mapping[str, Any], is_eager: bool
) -> None:
    """Give a cache the newest source of plans; where nothing was calibrated, the prompt will, or does if it cannot be watched.

    runs: the part that can be called with the inputs.
    """
    session, has_coordinates = session_of(model), False
    if session.source.needs_calibration and is_eager and attention_of(model) == "sdpa":
        has_coordinates = begin(session, runs, inputs, cache).has_coordinates
    else:
        session.calibrate_on_first(runs, inputs)
    cache.groups.source = session.newest(cache.groups.source)
    watch_rotary(model, has_coordinates)


def note_call(model: nn.Module, part: nn.Module, cache: CompactedCache, kwargs: Mapping[str, Any]) -> None:
    """Say that the cache was found where generate does not put it: that it is packed all the same need not be expected."""
    if part not in generating_parts(model):
        cache.note(f"{type(part).__name__} was called itself: packed as when {type(model).__name__} is called")
    elif cache_of((), kwargs) is not cache:
        cache.note("the cache was passed by position: packed as when it is passed by name")


def begin_forward(session: Session, part: nn.Module, cache: CompactedCache) -> None:
    """An eager pass of a part over a packed cache begins."""
    cache.running, cache.chunks_before, session.last.dense_passes = id(part), cache.eager_chunks, 0
    session.running.cache = weakref.ref(cache)
    cache.show_attention(attention_of(part) == "sdpa")


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
    if cache.held_back is not None and cache.held_back.states:
        finish(session, cache)
    if cache.is_told:
        why = " (gradient checkpointing in train mode)" if is_checkpointing(part) else ""
        session.tell(cache, f"{type(part).__name__}.forward stored nothing in the packed cache that it was given{why}")
    tiers = [plan.tiers for plan in cache.groups.plans if plan is not None and plan.tiers is not None]
    in_part = not all(rule.reads_all for rule in tiers)
    if cache.is_filled and in_part and cache.eager_chunks == cache.chunks_before:
        cache.note(
            "a forward compiled by hand: unless its backend is attentionpack, it reads every token held, not tiers"
        )
    unseen = cache.unsettled() if cache.is_filled else []
    if unseen:
        layers = ", ".join(map(str, unseen))
        session.tell(cache, f"layers {layers}: no scaled_dot_product_attention was seen; every token is kept and read")


def attention_of(model: nn.Module) -> str:
    """The implementation of a model's attention: states are stored and watched for "sdpa", others are spelled otherwise."""
    return model.config.get_text_config(decoder=True)._attn_implementation


def is_checkpointing(part: nn.Module) -> bool:
    """Whether a part recomputes its layers in a backward pass, for which transformers takes their cache away."""
    return part.training and any(getattr(module, "gradient_checkpointing", False) for module in part.modules())


def watch_rotary(model: nn.Module, has_coordinates: bool = False) -> None:
    """Where keys rotate by several coordinates, see what rotary embeddings are given, from now on."""
    session = session_of(model)
    if session is None or session.rotary_hooks or not (has_coordinates or session.source.needs_coordinates):
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
    running = None if session is None else session.running.cache
    cache = None if running is None else running()
    if cache is not None and positions is not None:
        cache.show_positions(positions)


def note_new_weights(model: nn.Module, incompatible_keys: Any) -> None:
    """Load-state-dict hook: what was calibrated belongs to the weights before."""
    session = session_of(model)
    if session is not None and (session.plan is not None or session.calibration is not None):
        what = "pass a plan made for these weights" if session.plan is not None else "call calibrate again"
        session.outdated = f"load_state_dict after the bases were calibrated: they fit the weights before it; {what}"
