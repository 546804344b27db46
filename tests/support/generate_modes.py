"""Ways to generate, what becomes of each with a packed cache, and the table of docs/guides/generate.md made from them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from llava_and_draft import draft
from transformers import DynamicCache, TextIteratorStreamer

WORKS, DENSE, REFUSED, HUB = "works", "dense, as asked for", "refused", "not in transformers"


@dataclass(frozen=True)
class Mode:
    """One way to call generate.

    settings: keyword arguments, those in `made` by calling with the model. compiled: whether decode steps are compiled.
    step: what the table says of decode steps, where that is more. error: what is raised, for those that are refused.
    """

    name: str
    call: str
    result: str
    remark: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    compiled: bool = False
    step: str = ""
    error: str = ""

    def arguments(self, model: Any) -> dict[str, Any]:
        """Keyword arguments for this model."""
        return {**self.settings, **{name: make(model) for name, make in self.made.items()}}


class Numbers:
    """A tokenizer for streamers: ids as text."""

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids.tolist() if torch.is_tensor(ids) else ids)) + " "


def stop_at_12(_: Any) -> list[Callable]:
    """A stopping criterion of a few tokens."""
    steps = iter(range(1, 1000))
    return [lambda ids, scores: torch.full((len(ids),), next(steps) >= 12)]


def by_hand(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kept: Any,
) -> Any:
    """A decoding method of the user's own."""
    for step in range(9):
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1 if step else None, is_first_iteration=not step, **kept
        )
        out = model(**inputs, return_dict=True)
        kept = model._update_model_kwargs_for_generation(out, kept)
        input_ids = torch.cat([input_ids, out.logits[:, -1].argmax(-1)[:, None]], 1)
    return input_ids


PROCESSORS = {
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.3,
    "bad_words_ids": [[5]],
    "sequence_bias": {(7,): 2.0},
    "prefix_allowed_tokens_fn": lambda _, ids: list(range(3, 60)),
}
OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}
ASSISTED_IS_COMPILED = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
ASSISTED = "eager; compiled where nothing was drafted, from transformers 5.24 on"
BY_TRANSFORMERS = "transformers itself compiles no step of it"
MOVED = "`custom_generate=` loads it from the hub with `trust_remote_code=True`; as any method that goes through the cache it is given"

MODES = [
    Mode("greedy", "`do_sample=False`", WORKS, compiled=True),
    Mode("sampling", "`do_sample=True`", WORKS, settings={"do_sample": True, "temperature": 0.9}, compiled=True),
    Mode(
        "several sequences",
        "`num_return_sequences=3`",
        WORKS,
        settings={"do_sample": True, "num_return_sequences": 3},
        compiled=True,
    ),
    Mode("beams", "`num_beams=3`", WORKS, f"{BY_TRANSFORMERS}: slower than greedy decoding", {"num_beams": 3}),
    Mode(
        "beams, sampled",
        "`num_beams=3, do_sample=True`",
        WORKS,
        BY_TRANSFORMERS,
        {"num_beams": 3, "do_sample": True},
    ),
    Mode(
        "assisted",
        "`assistant_model=`",
        WORKS,
        "batch of 1, an empty cache; the assistant may be optimized too; over a lossy cache not always the tokens of greedy decoding",
        made={"assistant_model": lambda _: draft()},
        compiled=ASSISTED_IS_COMPILED,
        step=ASSISTED,
    ),
    Mode(
        "prompt lookup",
        "`prompt_lookup_num_tokens=`",
        WORKS,
        "as assisted; any number of tokens",
        {"prompt_lookup_num_tokens": 4},
        compiled=ASSISTED_IS_COMPILED,
        step=ASSISTED,
    ),
    Mode(
        "chunked prefill",
        "`prefill_chunk_size=`",
        WORKS,
        "with a ratio, calibrate first; the plan is the whole prompt's; presets with eviction choose by the newest tokens of each chunk",
        {"prefill_chunk_size": 13},
        compiled=True,
    ),
    Mode("processors", "logits processors, `prefix_allowed_tokens_fn`", WORKS, settings=PROCESSORS, compiled=True),
    Mode(
        "guidance",
        "`guidance_scale=1.5`",
        WORKS,
        "the unguided pass of each step keeps a dense cache of its own (noted)",
        {"guidance_scale": 1.5},
        compiled=True,
    ),
    Mode("stopping criteria", "`stopping_criteria=`", WORKS, made={"stopping_criteria": stop_at_12}, compiled=True),
    Mode(
        "streaming",
        "`streamer=`",
        WORKS,
        made={"streamer": lambda _: TextIteratorStreamer(Numbers())},
        compiled=True,
    ),
    Mode("outputs", "`output_scores`, `output_logits`, `output_hidden_states`", WORKS, settings=OUTPUTS, compiled=True),
    Mode(
        "attention weights",
        '`output_attentions=True` with `attn_implementation="eager"`',
        WORKS,
        "columns up to the capacity, as with a static cache, those of empty slots 0; sites stay unpacked then, and `strict` raises",
    ),
    Mode(
        "several turns",
        "`cache=` of the last call",
        WORKS,
        "`return_dict_in_generate` hands the packed cache on; `new_cache(model)` gives one to start with",
        compiled=True,
    ),
    Mode(
        "static prompt length",
        "padded on the left",
        WORKS,
        "one graph for all prompts of a plan; the prompt itself is read eagerly",
        compiled=True,
    ),
    Mode("a method of one's own", "`custom_generate=function`", WORKS, settings={"custom_generate": by_hand}),
    Mode(
        "another cache",
        "`cache_implementation=`",
        DENSE,
        "noted in the report; leave it out",
        {"cache_implementation": "static"},
    ),
    Mode(
        "a cache of one's own",
        "`cache=DynamicCache(...)`",
        DENSE,
        "noted in the report; leave it out, or pass `new_cache(model)`",
        made={"past_key_values": lambda model: DynamicCache(config=model.config.get_text_config())},
    ),
    Mode("no cache", "`use_cache=False`", DENSE, "noted in the report; leave it out"),
    Mode(
        "continuous batching",
        "`generate_batch`, `init_continuous_batching`, `continuous_batching_context_manager`, `ContinuousBatchingManager`, "
        '`cache_implementation="paged"`',
        REFUSED,
        "for now: its requests live in a paged dense cache of its own, which cannot be packed yet; call generate with a batch, or "
        "`restore(model)`",
        {"cache_implementation": "paged"},
        error="continuous batching is refused for now: it keeps all requests in a paged dense cache",
    ),
    Mode(
        "early exit",
        "`assistant_early_exit=`",
        REFUSED,
        "drafts come from fewer layers than the cache has: pass an assistant, or look drafts up in the prompt",
        {"assistant_early_exit": 1},
        error="assistant_early_exit=1: drafts come from the model with fewer layers",
    ),
    Mode(
        "contrastive search",
        "`penalty_alpha=, top_k=`",
        HUB,
        MOVED,
        {"penalty_alpha": 0.6, "top_k": 4},
        error="transformers-community/contrastive-search",
    ),
    Mode("DoLa", "`dola_layers=`", HUB, MOVED, {"dola_layers": "high"}, error="transformers-community/dola"),
    Mode(
        "group beams",
        "`num_beam_groups=`",
        HUB,
        MOVED,
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        error="transformers-community/group-beam-search",
    ),
    Mode(
        "constrained beams",
        "`force_words_ids=`",
        HUB,
        MOVED,
        {"force_words_ids": [[5]], "num_beams": 3},
        error="transformers-community/constrained-beam-search",
    ),
]


def table() -> str:
    """The modes as Markdown."""
    lines = ["| Mode | Call | Result | Decode step | What to know |", "|---|---|---|---|---|"]
    for mode in MODES:
        step = (mode.step or ("compiled" if mode.compiled else "eager")) if mode.result == WORKS else ""
        lines.append(f"| {mode.name} | {mode.call} | {mode.result} | {step} | {mode.remark} |")
    return "\n".join(lines)
