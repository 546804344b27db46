"""A prompt that is read once, and branches that go on behind it (docs/guides/one_prompt.md)."""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer import MAX_APPEND
from apack_compile.cache.sharing import branch_of, share, why_not_shared
from apack_compile.checks import counted
from apack_compile.generate.generation import CHUNKS_GO_ON, Options, check_length, new_tokens
from apack_compile.generate.prefix_file import INPUT_IDS, cache_of_contents, contents, read, write
from apack_compile.generate.session import DEFAULT_NEW_TOKENS, Session, session_of
from apack_compile.models.cache_argument import NAMES, OWN_NAME, takes_argument, with_cache
from apack_compile.models.coordinates import put_rope_deltas, rope_deltas_of
from apack_compile.models.modality import vision_of
from apack_compile.models.offload import computing_device
from apack_compile.models.wrappers import unwrapped


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that a model has read, packed. It never changes, however many branches go on behind it.

    input_ids: `[1, P]`, on the model's device.
    """

    input_ids: Tensor
    _model: nn.Module = field(repr=False)
    _cache: CompactedCache = field(repr=False)

    def __deepcopy__(self, memo: dict) -> "Prefix":
        return self

    @property
    def length(self) -> int:
        """Tokens."""
        return self.input_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, without the bases that all requests share."""
        return self.report()["sequence_bytes"]

    def report(self) -> dict[str, Any]:
        """Bytes held, as `CompactedCache.report` gives them."""
        return self._cache.report()

    def branch(self, n: int = 1, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> CompactedCache:
        """A cache of n rows behind the prefix, to pass as `cache=` with the prefix's tokens and each row's own; it grows when it must.

        Raises ValueError for a bad argument.
        """
        for name, value, least in (("n", n, 1), ("max_new_tokens", max_new_tokens, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer >= {least}")
        branch, session = branch_of(self._cache, n, max_new_tokens), session_of(self._model)
        if session is not None:
            # what the report is about
            session.last.cache = weakref.ref(branch)
        return branch

    def generate(self, questions: Tensor | Mapping[str, Any], **options: Any) -> Any:
        """What the model's `generate` gives for the prefix and each question behind it: sequences `[n, P + T + new]`.

        questions: token ids `[n, T]`, or what a tokenizer returns: `input_ids` with an `attention_mask`, padded on either side; rows
        come back padded on the left. options: those of `generate`. Raises ValueError for questions that cannot be read.
        """
        given = dict(questions) if isinstance(questions, Mapping) else {"input_ids": questions}
        taken = [name for name in (*NAMES, "inputs_embeds") if given.get(name, options.get(name)) is not None]
        if taken:
            raise ValueError(f"{taken[0]}: is the prefix's own to give; pass token ids of the questions alone")
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise ValueError("questions: input_ids must be a tensor of token ids, [n, T]")
        asked = Options((), options, self._model.generation_config)
        copies = max(asked.get("num_beams") or 1, asked.get("num_return_sequences") or 1)
        inputs = self._with_questions(given)
        whole = inputs["input_ids"]
        check_length(self._model, whole, inputs["attention_mask"])
        is_long = whole.shape[1] - self.length > MAX_APPEND
        if is_long and CHUNKS_GO_ON and not vision_has(self._model, given["input_ids"]):
            # in one piece, each layer would decode the prefix once for every row
            options.setdefault("prefill_chunk_size", asked.get("prefill_chunk_size") or MAX_APPEND)
        cache = self.branch(len(whole) * copies, new_tokens(asked, whole))
        return self._model.generate(**inputs, **{OWN_NAME: cache}, **options)

    def _with_questions(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of the prefix and of the questions, padded between the two."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise ValueError(
                f"questions: attention_mask {list(mask.shape)} must have the shape of input_ids {list(ids.shape)}"
            )
        real = mask != 0
        counts = real.sum(1)
        if not counts.numel() or not counts.all():
            raise ValueError("questions: each must have at least one token")
        if self._cache.groups.rope_deltas and vision_has(self._model, ids):
            raise ValueError(
                "questions: pictures in them are positioned by those before them; read them with the prefix, or pass whole prompts with "
                "cache=prefix.branch(n)"
            )
        lengths = sorted(set(counts.tolist()))
        if len(lengths) > 1 and (why := why_not_padded(self._cache)):
            raise ValueError(
                f"questions: their lengths differ ({', '.join(map(str, lengths))}), and {why}; ask those of one length together"
            )
        # stable, so padding moves to the front and tokens stay in order
        order = real.to(torch.uint8).argsort(dim=1, stable=True)[:, -int(counts.max()) :]
        found = {}
        for name, x in {**given, "attention_mask": mask}.items():
            if not isinstance(x, Tensor) or x.shape != ids.shape:
                found[name] = x
                continue
            before = (
                self.input_ids
                if name == "input_ids"
                else torch.full_like(self.input_ids, int(name == "attention_mask"))
            )
            found[name] = torch.cat([before.to(x).expand(len(x), -1), x.gather(1, order)], 1)
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write the prefix to one file, in place of an old one or not at all; raises ValueError where layers hold what is not packed."""
        write(path, *contents(self._model, self.input_ids, self._cache))

    def to(self, device: torch.device | str) -> "Prefix":
        """The same prefix on a device, where its model is by now; raises ValueError where layers hold what is not packed."""
        values, tensors = contents(self._model, self.input_ids, self._cache)
        moved = {name: x.to(device) for name, x in tensors.items()}
        return prefix_of_contents(self._model, values, moved, "to")


def why_not_padded(cache: CompactedCache) -> str | None:
    """Why padding between a prefix and a question would change what the question sees; None where it would not."""
    sliding = [i for i, layer in enumerate(cache.layers) if getattr(layer, "is_sliding", False)]
    linear = [i for i, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionLayer)]
    if sliding:
        return f"padding would take up the windows of layers {', '.join(map(str, sliding))}"
    return f"padding would change the linear states of layers {', '.join(map(str, linear))}" if linear else None


def vision_has(model: nn.Module, ids: Tensor) -> bool:
    """Whether token ids `[n, T]` have placeholders of pictures."""
    vision = vision_of(model.config, {"input_ids": ids})
    return vision is not None and bool(vision.any())


def model_that_reads(model: Any) -> Any:
    """The model inside of what is around it; raises ValueError where that puts tokens of its own before a prompt."""
    method = getattr(model, "active_peft_config", None)
    if getattr(method, "is_prompt_learning", False):
        raise ValueError(f"read: PEFT's {type(method).__name__} puts tokens of its own before every prompt")
    return unwrapped(model)


def read_prefix(model: nn.Module, session: Session, inputs: Mapping[str, Any]) -> Prefix:
    """Read a prompt into a prefix; raises ValueError for inputs that are not one prompt, and where rows cannot share it."""
    check_prompt(inputs)
    ids, source = inputs["input_ids"], session.source
    plans = source.presets.values() if source.given is None else source.given.by_window.values()
    for why in filter(None, map(why_not_shared, plans)):
        raise ValueError(f"read: {why}; optimize with ratio=, or preset='lossless'")
    check_length(model, ids)
    cache = session.new_cache(model, 0)
    put_rope_deltas(model, dict.fromkeys(rope_deltas_of(model)))
    options = {"use_cache": True} | ({"logits_to_keep": 1} if takes_argument(model, "logits_to_keep") else {})
    with torch.no_grad(), session.own_passes():
        model(**with_cache(model, inputs, cache), **{name: x for name, x in options.items() if name not in inputs})
    if not cache.is_filled:
        raise ValueError(f"read: {'; '.join(cache.notes) or 'the model did not use the cache that it was given'}")
    share(cache)
    cache.groups.rope_deltas = {name: x.to(ids.device) for name, x in rope_deltas_of(model).items()}
    session.last.remember(cache)
    return Prefix(ids.clone(), model, cache)


def prefix_of_contents(model: nn.Module, values: Any, tensors: dict[str, Tensor], about: str) -> Prefix:
    """A prefix from what it is; raises ValueError where the model would not read it right."""
    session = session_of(model)
    if session is None:
        raise ValueError(
            f"{about}: this {type(model).__name__} is not optimized any more; call apack_compile.optimize(model) first"
        )
    cache = cache_of_contents(model, session, values, tensors, about)
    return Prefix(tensors[INPUT_IDS], model, cache)


def load(model: nn.Module, session: Session, path: str | os.PathLike) -> Prefix:
    """The prefix of a file; raises OSError where it cannot be read, and ValueError where it is none that the model can use."""
    session.follow(model)
    values, tensors = read(path)
    there = {name: x.to(computing_device(model)) for name, x in tensors.items()}
    return prefix_of_contents(model, values, there, f"path={str(path)!r}")


def check_prompt(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for inputs that are not the token ids of one prompt, without padding."""
    for name in (*NAMES, "inputs_embeds"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name}: read takes input_ids of a prompt, and makes the cache itself")
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids: {shape} must be token ids of one prompt, [1, P]")
    if isinstance(mask, Tensor) and not bool((mask != 0).all()):
        raise ValueError(f"attention_mask: hides {counted(int((mask == 0).sum()), 'token')}; a prefix has no padding")
