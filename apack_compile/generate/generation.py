"""The generate of an optimized model, and what it refuses (docs/guides/generate.md)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin
from transformers.masking_utils import create_chunked_causal_mask, create_masks_for_generate

from apack_compile.cache.cache import CompactedCache
from apack_compile.errors import StrictError
from apack_compile.generate.decode_step import why_not_compiled
from apack_compile.generate.session import DEFAULT_NEW_TOKENS, Session, session_of
from apack_compile.models.cache_argument import NAMES, OWN_NAME, cache_of, with_cache
from apack_compile.models.continuous_batching import refuse_continuous_batching
from apack_compile.models.coordinates import put_rope_deltas, rope_deltas_of
from apack_compile.models.modality import padding_of, vision_of
from apack_compile.models.offload import computing_device
from apack_compile.models.wrappers import PreparedInputs, own_cache_of_adapter, prepares_otherwise

# Before, transformers cut the whole prompt into chunks, what a cache holds of it too.
CHUNKS_GO_ON = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)


def generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """transformers' generate with a packed cache, unless the caller chose another cache or none."""
    session = session_of(model)
    if session is None:
        # called by a user's function that was put around it before restore
        return type(model).generate(model, *args, **kwargs)
    with session.own_passes():
        return _generate(model, session, args, kwargs)


def is_packed_generate(function: Any) -> bool:
    """Whether something on a model is what optimize puts there as its generate."""
    return getattr(function, "__func__", None) is generate


def _generate(model: nn.Module, session: Session, args: tuple, kwargs: dict[str, Any]) -> Any:
    plain = type(model).generate
    options = Options(args, kwargs, model.generation_config)
    cache = cache_of((), kwargs)
    implementation = options.get("cache_implementation")
    check_mode(options, implementation)
    if cache is None and (options.get("use_cache") is False or implementation is not None):
        session.last.unused = f"cache_implementation={implementation!r}" if implementation else "use_cache=False"
        return plain(model, *args, **kwargs)
    prompt = prompt_of(args, kwargs)
    if cache is None:
        check_length(model, prompt, kwargs.get("attention_mask"))
        expected = new_tokens(options, prompt)
        session.last.unused = own_cache_of_adapter(model) or session.too_short(
            length_of(prompt), expected, computing_device(model).type
        )
        if session.last.unused:
            return plain(model, *args, **kwargs)
        cache = session.new_cache(model, expected)
    session.last.unused = (
        None if isinstance(cache, CompactedCache) else f"the cache that was passed is a {type(cache).__name__}"
    )
    if session.last.unused:
        return plain(model, *args, **kwargs)
    cache.check_whole()
    check_drafts(options, cache, prompt, kwargs.get("attention_mask"))
    kwargs = {**{name: x for name, x in kwargs.items() if name not in NAMES}, OWN_NAME: cache}
    if options.get("prefill_chunk_size") is not None:
        if cache.is_filled and not CHUNKS_GO_ON:
            raise ValueError(
                f"prefill_chunk_size: the cache holds {int(cache.get_seq_length())} tokens, which transformers {transformers.__version__} "
                "would read again (5.24 does not); leave it out"
            )
        if not cache.is_filled:
            plan_chunks(model, session, cache, kwargs, prompt)
    if options.get("guidance_scale") not in (None, 1, 1.0):
        cache.note("guidance_scale: the unguided pass of each step keeps a dense cache of its own")
    # PEFT's prompt learning puts its own in place: it takes no masks of four dimensions, and adds tokens to a step
    why_eager = why_no_masks(model)
    cache.may_compile = why_eager is None
    if why_eager is not None:
        cache.note(f"{why_eager}: decode steps run eagerly")
    drafts, recorded = bool(getattr(options.config, "is_assistant", False)), cache.is_recording
    if drafts:
        cache.activate_past_recording()
    if session.inner is None or why_not_compiled(model) is not None:
        kwargs.setdefault("disable_compile", True)
    elif options.get("compile_config") is not None:
        cache.note(
            "compile_config is the caller's: unless its backend is attentionpack, a step unpacks every token held"
        )
    elif cache.is_compileable:
        kwargs["compile_config"] = session.decode.config
    if plain is GenerationMixin.generate:
        cache.groups.prompt_end = prompt_end(kwargs, prompt, int(cache.get_seq_length()) if drafts else 0)
    put_rope_deltas(model, cache.groups.rope_deltas)
    try:
        out = plain(model, *args, **kwargs)
    except BaseException:
        cache.recover()
        raise
    finally:
        cache.groups.prompt_end = None
        if not (drafts or recorded):
            # assisted decoding asks for it, and is over
            cache.deactivate_past_recording()
    say_what_was_left_out(session, cache, out if plain is GenerationMixin.generate else None, prompt)
    if cache.groups.is_branch:
        cache.groups.rope_deltas = rope_deltas_of(model)
    if cache.is_filled:
        session.last.remember(cache)
    return out


def say_what_was_left_out(session: Session, cache: CompactedCache, out: Any, prompt: torch.Tensor | None) -> None:
    """After a generate call: say where the model went on without the cache; raises StrictError when strict."""
    if not cache.is_filled:
        session.last.held = None
        session.last.unused = "; ".join(cache.notes) or "the model did not use the cache that it was given"
        if session.config.strict:
            raise StrictError(f"strict: {session.last.unused}")
        return
    said = getattr(out, "sequences", out)
    if not isinstance(said, torch.Tensor) or said.dim() != 2:
        return
    given = 0 if prompt is None or prompt.dim() == 2 else prompt.shape[1]
    held, produced = int(cache.get_seq_length()), given + said.shape[1] - 1
    if held < produced:
        session.tell(cache, f"the cache holds {held} of {produced} tokens: the model went on without it")


def keeping_the_cache(prepare: Callable) -> PreparedInputs:
    """`prepare_inputs_for_generation` of a model that drops its cache to read all tokens anew: the cache is emptied and passed on.

    Phi-3 does so where a sequence outgrows `original_max_position_embeddings`: its rotary frequencies change there.
    """

    @wraps(prepare)
    def prepared(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs, cache = prepare(model, *args, **kwargs), cache_of(args, kwargs)
        if not isinstance(cache, CompactedCache) or cache_of((), inputs) is not None:
            return inputs
        if cache.is_filled:
            cache.note(f"after {int(cache.get_seq_length())} tokens the model asked to read all of them anew")
            cache.reset()
        return with_cache(model, inputs, cache)

    return PreparedInputs(prepared)


@dataclass(frozen=True)
class Options:
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


def check_mode(options: Options, implementation: str | None) -> None:
    """Raise ValueError for a way to generate that would not use the packed cache without saying so."""
    if implementation == "paged":
        refuse_continuous_batching("cache_implementation='paged'")
    if options.get("assistant_early_exit") is not None:
        raise ValueError(
            f"assistant_early_exit={options.get('assistant_early_exit')!r}: drafts come from the model with fewer layers, whose "
            "cache would not be this model's; pass assistant_model= or prompt_lookup_num_tokens="
        )


def check_drafts(options: Options, cache: CompactedCache, prompt: torch.Tensor | None, mask: Any) -> None:
    """Raise ValueError where transformers would store tokens a second time: drafting, it reads all of a prompt, held or not."""
    drafting = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if options.get(name) is not None]
    given = length_of(prompt)
    if not drafting or not cache.is_filled or given is None:
        return
    if given == (mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else given):
        raise ValueError(
            f"{drafting[0]}: the cache holds {int(cache.get_seq_length())} tokens, and where transformers drafts it reads the whole "
            f"prompt of {given} again; pass a new cache, or generate without drafts"
        )


def plan_chunks(
    model: nn.Module, session: Session, cache: CompactedCache, kwargs: Mapping[str, Any], prompt: torch.Tensor | None
) -> None:
    """Choose the plan for a whole prompt that is read in chunks; raises ValueError where a chunk would have to calibrate."""
    if cache.groups.source is None or prompt is None:
        return
    if session.source.needs_calibration:
        raise ValueError(
            f"prefill_chunk_size: with ratio={session.ratio:g} the first chunk would be all that bases are calibrated on; "
            "call apack_compile.calibrate(model, inputs) first"
        )
    cache.groups.source = session.newest(cache.groups.source)
    vision = vision_of(model.config, {"input_ids": prompt if prompt.dim() == 2 else None})
    padding = padding_of(kwargs, prompt.shape[1])
    none = torch.zeros(prompt.shape[:2], dtype=torch.bool)
    cache.groups.choose_plans(*(none if flags is None else flags.cpu() for flags in (vision, padding)))


def prompt_of(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Token ids or embeddings of the prompt, None when the inputs do not tell."""
    given = (args[0] if args else None, *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
    found = next((x for x in given if x is not None), None)
    return found if isinstance(found, torch.Tensor) and found.dim() >= 2 else None


def why_no_masks(model: nn.Module) -> str | None:
    """Why transformers does not make the masks of four dimensions that a compiled step takes; None where it does."""
    if prepares_otherwise(model):
        return "the model's prepare_inputs_for_generation was replaced (as PEFT's prompt learning does)"
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    given, taken = (
        "block_sequence_ids" in signature(f).parameters for f in (create_masks_for_generate, create_chunked_causal_mask)
    )
    if "chunked_attention" in kinds and given and not taken:
        return f"transformers {transformers.__version__} cannot make the masks of chunked attention"
    return None


def prompt_end(kwargs: Mapping[str, Any], prompt: torch.Tensor | None, drafted_from: int) -> int | None:
    """Position where the prompt ends, None when the inputs do not tell; an assistant's own ends where its cache did before."""
    mask = kwargs.get("attention_mask")
    end = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else length_of(prompt)
    return drafted_from or end


def length_of(prompt: torch.Tensor | None) -> int | None:
    """Tokens of the prompt."""
    return None if prompt is None else prompt.shape[1]


def check_length(model: nn.Module, prompt: torch.Tensor | None, mask: Any = None) -> None:
    """Raise ValueError for a prompt that the model cannot read: without tokens, or longer than its table of positions."""
    length = length_of(prompt)
    if length == 0:
        raise ValueError("input_ids: the prompt has zero tokens; pass at least one")
    limit = position_table_length(model)
    if length is None or limit is None or length <= limit:
        return
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        # padding takes no position
        length = int((mask != 0).sum(1).max())
    if length > limit:
        raise ValueError(f"input_ids: the prompt has {length} tokens; the model's positions end at {limit}")


def position_table_length(model: nn.Module) -> int | None:
    """How many positions a model that looks them up in a table knows; None for positions without an end."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = {name: part.num_embeddings for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    tables |= {name: len(x) for name, x in model.named_buffers() if x.dim() == 2 and not name.endswith("_ids")}
    # some tables have a few rows more, for padding
    is_table = any("pos" in name or "wpe" in name for name, rows in tables.items() if limit and 0 <= rows - limit <= 2)
    return limit if is_table else None


def new_tokens(options: Options, prompt: torch.Tensor | None) -> int:
    """New tokens to expect of a generate call."""
    new_tokens, longest = options.get("max_new_tokens"), options.get("max_length")
    if new_tokens is None and longest is not None and prompt is not None:
        new_tokens = longest - prompt.shape[1]
    return max(int(new_tokens or DEFAULT_NEW_TOKENS), 1)


def compiled_call(model: nn.Module, part: nn.Module, compile_config: Any) -> Callable:
    """What generate calls in place of a generating part of the model: our decode steps, unless the caller has a config of his own."""
    decode = session_of(model).decode
    # a copied config has the same backend; transformers itself does not compile Llama 4, whose masks and cache are ours here
    ours = decode is not None and compile_config is not None and compile_config.backend is decode.config.backend
    return partial(decode.run, part) if ours else type(part).get_compiled_call(part, compile_config)
