"""Log-probabilities of tokens, each predicted over a packed cache of the tokens before it.

Evaluations call a model without a cache, so what they measure is the dense model. Here a prompt is read into a packed cache, and
the tokens to be scored are appended to it, a few at a time: a chunk's own tokens are exact, every token before it is as the cache
holds it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer import MAX_APPEND
from apack_compile.generate.hooks import watch_rotary
from apack_compile.generate.session import session_of
from apack_compile.kernels.cursor import PACKED
from apack_compile.models.cache_argument import with_cache
from apack_compile.models.offload import computing_device
from apack_compile.models.wrappers import unwrapped

# Appended tokens are never coarse; so many are laid out at once where the plan has a coarse rule, or its ratio would not be met.
SPAN = 512


@dataclass(frozen=True)
class Row:
    """`read` is read at once, as a prompt; token i of `inputs` then predicts token i of each of `targets`."""

    read: tuple[int, ...]
    inputs: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens that the model is given."""
        return self.read + self.inputs


@dataclass
class RowScores:
    """Of each of a row's targets: summed log-probability, and whether every token was the likeliest.

    packed_tokens: how many tokens of a target were predicted while the cache held packed tokens of the row; the others were predicted
    while all its tokens were still dense, as the first and the newest ones are.
    """

    log_probs: list[float]
    greedy: list[bool]
    packed_tokens: int = 0


@dataclass(frozen=True)
class BatchScores:
    """Scores of a batch of rows, in their order, and the bytes that its cache held when the last token was scored."""

    rows: list[RowScores]
    bytes: dict[str, int | float] = field(repr=False)


@torch.no_grad()
def score(
    model: nn.Module, rows: Sequence[Row], chunk_tokens: int = MAX_APPEND, softmax_dtype: torch.dtype | None = None
) -> BatchScores:
    """Score a batch of rows over a packed cache of an optimized model, `chunk_tokens` tokens at a time (1 to 32).

    Rows that read the same tokens share one pass over them. Without calibrated bases, these rows serve as calibration.
    Raises ValueError for a model that is not optimized, rows without inputs, and rows too short to calibrate on.
    """
    check_arguments(rows, chunk_tokens)
    if has_learned_prompt(model):
        raise ValueError(
            f"model: this {type(model).__name__} puts learned tokens before a prompt, which are not scored; use generate"
        )
    model = unwrapped(model)
    session = session_of(model)
    if session is None:
        raise ValueError(
            f"model: this {type(model).__name__} is not optimized; call apack_compile.optimize(model) first"
        )
    if session.source.needs_calibration:
        session.calibrate_on_first(model, padded([row.tokens for row in rows], computing_device(model), "left"))
        watch_rotary(model)
    cache = session.new_cache(model, max(len(row.inputs) for row in rows))
    none = torch.zeros(1, max(len(row.tokens) for row in rows), dtype=torch.bool)
    cache.groups.choose_plans(none, none)
    batch = _Batch(model, cache)
    batch.read([row.read for row in rows])
    scores = [RowScores([0.0] * len(row.targets), [True] * len(row.targets)) for row in rows]
    alive, longest = list(range(len(rows))), max(len(row.inputs) for row in rows)
    # Jamba's scan, for one, begins anew with every chunk of several tokens
    step, laid_out = 1 if batch.has_states else chunk_tokens, 0
    for start in range(0, longest, step):
        staying = [i for i, row in enumerate(alive) if len(rows[row].inputs) > start]
        if len(staying) < len(alive):
            batch.select(staying)
            alive = [alive[i] for i in staying]
        from_packed = packed_tokens(cache) > 0 if cache.is_filled else torch.zeros(len(alive), dtype=torch.bool)
        pieces = [rows[row].inputs[start : start + step] for row in alive]
        logits = batch.forward(padded(pieces, computing_device(model), "right"))
        log_probs = torch.log_softmax(logits, dim=-1, dtype=softmax_dtype)
        likeliest = logits.argmax(-1)
        for i, (row, piece) in enumerate(zip(alive, pieces, strict=True)):
            for j, target in enumerate(rows[row].targets):
                wanted = torch.tensor(target[start : start + len(piece)], device=logits.device)
                found = log_probs[i, : len(piece)].gather(1, wanted[:, None])
                scores[row].log_probs[j] += float(found.sum())
                scores[row].greedy[j] &= bool((likeliest[i, : len(piece)] == wanted).all())
            scores[row].packed_tokens += len(piece) * bool(from_packed[i])
        done = start + step
        if done - laid_out >= SPAN and done < longest:
            batch.lay_out_again([rows[row].inputs[laid_out:done] for row in alive])
            laid_out = done
    session.last.remember(cache)
    return BatchScores(scores, cache.report())


def check_arguments(rows: Sequence[Row], chunk_tokens: int) -> None:
    """Raise ValueError for rows that cannot be scored, and for chunks that are not appended."""
    if not rows:
        raise ValueError(f"rows={rows!r} must hold at least one Row")
    for i, row in enumerate(rows):
        lengths = [len(target) for target in row.targets]
        if not row.inputs or any(length != len(row.inputs) for length in lengths):
            raise ValueError(
                f"rows[{i}]: {len(row.inputs)} inputs and targets of {lengths} tokens; must be as many, at least one"
            )
    if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool) or not 1 <= chunk_tokens <= MAX_APPEND:
        raise ValueError(f"chunk_tokens={chunk_tokens!r} must be an integer from 1 to {MAX_APPEND}")


class _Batch:
    """A packed cache, the attention mask of its tokens, and forward passes over it."""

    def __init__(self, model: nn.Module, cache: CompactedCache) -> None:
        self.model, self.cache = model, cache
        self.mask: Tensor | None = None
        self.accepted = inspect.signature(model.forward).parameters
        self.has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        if self.lays_out_again:
            cache.activate_past_recording()

    @property
    def lays_out_again(self) -> bool:
        """Whether appended tokens are laid out once they are scored."""
        return self.cache.index.plan.coarse is not None and not self.has_states

    def read(self, reads: Sequence[tuple[int, ...]]) -> None:
        """Read what each row reads, the same tokens once."""
        if not any(reads):
            return
        distinct = list(dict.fromkeys(reads))
        self.forward(padded(distinct, computing_device(self.model), "left"), newest_logits=1)
        self.select([distinct.index(read) for read in reads])

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be there several times."""
        if not self.cache.is_filled or rows == list(range(len(self.mask))):
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]

    def forward(self, tokens: dict[str, Tensor], newest_logits: int = 0) -> Tensor:
        """Logits `[B, n, V]` of new tokens, of the newest few alone where that is asked for and the model can."""
        new = tokens["attention_mask"]
        self.mask = new if self.mask is None else torch.cat([self.mask, new], 1)
        inputs: dict[str, Any] = {"input_ids": tokens["input_ids"], "attention_mask": self.mask, "use_cache": True}
        if "position_ids" in self.accepted:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        if newest_logits and "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = newest_logits
        return self.model(**with_cache(self.model, inputs, self.cache)).logits

    def lay_out_again(self, span: Sequence[tuple[int, ...]]) -> None:
        """Take the newest tokens, `span`, out of the cache and read them as one chunk, which finds the coarse tokens among them."""
        if not self.lays_out_again or len({len(row) for row in span}) > 1:
            return
        tokens = min(self.cache.croppable, len(span[0]))
        self.cache.crop(-tokens)
        # what is read again stays
        self.cache.deactivate_past_recording()
        self.mask = self.mask[:, :-tokens]
        self.forward(padded([row[-tokens:] for row in span], computing_device(self.model), "right"), newest_logits=1)
        self.cache.activate_past_recording()


def has_learned_prompt(model: nn.Module) -> bool:
    """Whether a PEFT model puts tokens or keys of its own before every prompt."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def packed_tokens(cache: CompactedCache) -> Tensor:
    """How many packed tokens a filled cache holds of each row, `[B]`."""
    layer = cache.packed_layers[0]
    packed = [(positions >= 0) & (positions < layer.cursor[PACKED]) for positions in layer.positions()[1:]]
    return torch.cat(packed, 1).sum(1)


def padded(rows: Sequence[tuple[int, ...]], device: torch.device, side: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[B, longest]` of rows of tokens, padded on the left or right."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
