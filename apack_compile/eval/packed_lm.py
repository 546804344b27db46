"""lm-eval's HFLM, scoring from packed keys and values."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from apack_compile.api import optimize
from apack_compile.cache.layer import MAX_APPEND
from apack_compile.config import AttentionPackConfig
from apack_compile.files import check_file
from apack_compile.generate.session import Session, session_of
from apack_compile.models.cache_argument import with_cache
from apack_compile.models.wrappers import unwrapped
from apack_compile.plan.plan import Plan
from apack_compile.scoring import Row, RowScores, packed_tokens, score

# below lm-eval's own logger, whose level its command line sets
logger = logging.getLogger("lm_eval.apack")

# A request as lm-eval tokenizes it: its strings (None for a rolling window), context and continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# Rows of one context that are scored together, whatever the batch size: its packed cache is small, reading it again is not.
SHARED_ROWS = 8
EXACT = "no token of it was packed yet: the first and the newest tokens of a cache are dense"


@dataclass
class Counts:
    """What an evaluation's answers came from.

    packed, dense: requests; a packed one had its last token predicted over packed tokens. dense_because: why others were not.
    packed_tokens, scored_tokens: of log-likelihoods. dense_bytes, sequence_bytes: what a 16-bit dense cache would hold, and what the
    caches held when their last tokens were scored or generated.
    """

    packed: int = 0
    dense: int = 0
    dense_because: Counter[str] = field(default_factory=Counter)
    packed_tokens: int = 0
    scored_tokens: int = 0
    dense_bytes: int = 0
    sequence_bytes: int = 0

    def add_dense(self, reason: str, requests: int = 1) -> None:
        """Count requests that were not answered from packed keys."""
        if requests:
            self.dense += requests
            self.dense_because[reason] += requests

    def add_bytes(self, report: dict[str, Any]) -> None:
        """Add what a cache held."""
        self.dense_bytes += report["dense_bytes"]
        self.sequence_bytes += report["sequence_bytes"]

    @property
    def ratio(self) -> float | None:
        """Dense bytes over held bytes; None where no cache was packed."""
        return self.dense_bytes / self.sequence_bytes if self.sequence_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for lm-eval's results."""
        return {
            "requests_packed": self.packed,
            "requests_dense": self.dense,
            "dense_because": dict(self.dense_because),
            "packed_tokens": self.packed_tokens,
            "scored_tokens": self.scored_tokens,
            "ratio": self.ratio,
        }

    def __str__(self) -> str:
        lines = [f"{self.packed} of {self.packed + self.dense} requests were answered from packed keys and values"]
        if self.scored_tokens:
            lines.append(f"{self.packed_tokens} of {self.scored_tokens} scored tokens")
        if self.ratio is not None:
            lines.append(f"{self.ratio:.2f}x held")
        reasons = [f"{count} dense: {reason}" for reason, count in self.dense_because.items()]
        return "; ".join([", ".join(lines), *reasons])


@register_model("apack")
class PackedLM(HFLM):
    """HFLM whose contexts are read into a packed cache, and whose continuations are scored from it.

    pretrained: a path or name, which is optimized with the settings given here (ratio 4 without any), or a model, which is taken as it is
    where no setting is given: one that is not optimized gets HFLM's own numbers. Settings are those of `optimize`; config may also
    be the path of its JSON, plan the path of a plan. chunk_tokens: how many tokens of a continuation are scored at a time, 1 to 32;
    1 does what decoding does, slower. Other arguments are HFLM's. `counts` says what came from packed keys.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        config: AttentionPackConfig | str | None = None,
        ratio: float | None = None,
        preset: str | None = None,
        plan: Plan | str | None = None,
        quantize: Any = None,
        compile: str | None = None,
        strict: bool | None = None,
        min_tokens: int | None = None,
        chunk_tokens: int = MAX_APPEND,
        **hflm: Any,
    ) -> None:
        if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool) or not 1 <= chunk_tokens <= MAX_APPEND:
            raise ValueError(f"chunk_tokens={chunk_tokens!r} must be an integer from 1 to {MAX_APPEND}")
        given = {
            "config": config_in(Path(config)) if isinstance(config, str) else config,
            "ratio": ratio,
            "preset": preset,
            "plan": Plan.load(plan) if isinstance(plan, str) else plan,
            "quantize": quantize,
            "compile": compile,
            "strict": strict,
            "min_tokens": min_tokens,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        super().__init__(pretrained, **hflm)
        self.chunk_tokens = chunk_tokens
        self.counts = Counts()
        if settings or isinstance(pretrained, str):
            optimize(self.model, **settings)
        elif self.session is None:
            logger.warning("apack: the model is not optimized: every request is answered by the dense model")

    @property
    def session(self) -> Session | None:
        """What `optimize` keeps on the model; None where it is not optimized."""
        return session_of(unwrapped(self.model))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        session, counts = self.session, self.counts
        counts.scored_tokens += sum(len(continuation) for _, _, continuation in requests)
        if session is None:
            counts.add_dense("the model is not optimized", len(requests))
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        least = session.config.min_tokens or 0
        short = [i for i, (_, context, continuation) in enumerate(requests) if len(context) + len(continuation) < least]
        answers: dict[int, tuple[float, bool]] = {}
        if short:
            counts.add_dense(f"fewer tokens than min_tokens={least}", len(short))
            dense = super()._loglikelihood_tokens([requests[i] for i in short], disable_tqdm, override_bs)
            answers |= zip(short, dense, strict=True)
        groups = self._grouped(requests, set(range(len(requests))) - set(short))
        progress = tqdm(total=len(requests), initial=len(short), disable=disable_tqdm or self.rank != 0, desc="Scoring")
        for batch in batched(groups, self._rows_of_a_batch(requests, override_bs)):
            with torch.autocast(
                self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ):
                scores = score(self.model, [row for row, _ in batch], self.chunk_tokens, self.softmax_dtype)
            counts.add_bytes(scores.bytes)
            for (_, members), found in zip(batch, scores.rows, strict=True):
                for i, log_prob, greedy in zip(members, found.log_probs, found.greedy, strict=True):
                    answers[i] = log_prob, greedy
                    self._count(found)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                progress.update(len(members))
        progress.close()
        self._log()
        return [answers[i] for i in range(len(requests))]

    def _grouped(self, requests: Sequence[Request], chosen: Iterable[int]) -> list[tuple[Row, list[int]]]:
        """Rows that are to be scored, those that read the same next to each other, longest first; and the requests of each.

        All tokens before the last one of the context are read; that one and the continuation's, but for its last, are inputs.
        """
        members: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i in chosen:
            _, context, continuation = requests[i]
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            split = len(tokens) - len(continuation)
            members.setdefault((tokens[:split], tokens[split:]), []).append(i)
        rows = [
            (Row(read, inputs, tuple(tuple(requests[i][2]) for i in asked)), asked)
            for (read, inputs), asked in members.items()
        ]
        return sorted(rows, key=lambda row: (-len(row[0].read), row[0].read, -len(row[0].inputs)))

    def _rows_of_a_batch(self, requests: Sequence[Request], override_bs: int | None) -> int:
        """How many rows are scored together."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]), default=(None, [0], [0]))
        return override_bs or self._detect_batch_size([longest])

    def _count(self, found: RowScores) -> None:
        """Count one scored request."""
        self.counts.packed_tokens += found.packed_tokens
        if found.packed_tokens:
            self.counts.packed += 1
        else:
            self.counts.add_dense(EXACT)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        session, requests = self.session, len(context)
        if session is None:
            self.counts.add_dense("the model is not optimized", requests)
            return super()._model_generate(context, max_length, stop, **kwargs)
        new_tokens = max_length - context.shape[1]
        another = kwargs.get("cache_implementation") is not None or kwargs.get("use_cache") is False
        cache = None
        if not another and context.shape[1] + new_tokens >= (session.config.min_tokens or 0):
            cache = session.new_cache(unwrapped(self.model), new_tokens)
            kwargs = with_cache(self.model, kwargs, cache)
        out = super()._model_generate(context, max_length, stop, **kwargs)
        if cache is None or not cache.is_filled:
            self.counts.add_dense(session.last.unused or "its cache was not used", requests)
            return out
        packed = int((packed_tokens(cache).view(requests, -1) > 0).any(1).sum())
        self.counts.packed += packed
        self.counts.add_dense(EXACT, requests - packed)
        self.counts.add_bytes(cache.report())
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._log()
        return answers

    def _log(self) -> None:
        """Say what the answers so far came from, as a warning where some are the dense model's."""
        logger.log(logging.WARNING if self.counts.dense else logging.INFO, "apack: %s", self.counts)

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, with what the answers came from as `apack`."""
        return {**super().get_model_info(), "apack": self.counts.to_dict()}


def config_in(path: Path) -> AttentionPackConfig:
    """The settings in a file; raises OSError, and ValueError for a file without them."""
    check_file(path, "config", "the path of an AttentionPackConfig's JSON")
    try:
        return AttentionPackConfig.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"config={str(path)!r}: {error}") from error


def batched(groups: Sequence[tuple[Row, list[int]]], size: int) -> Iterator[list[tuple[Row, list[int]]]]:
    """Batches of about `size` rows: up to 8 that read the same stay together, rows that read nothing have batches of their own."""
    batch: list[tuple[Row, list[int]]] = []
    for group in groups:
        row = group[0]
        if batch:
            last = batch[-1][0]
            limit = max(size, SHARED_ROWS) if row.read == last.read and row.read else size
            if len(batch) >= limit or bool(row.read) != bool(last.read):
                yield batch
                batch = []
        batch.append(group)
    if batch:
        yield batch
