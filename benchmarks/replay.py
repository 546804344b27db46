"""Questions asked of a filled cache, and how far the answers are from the dense cache's.

Needs torch alone: the worker that runs kvpress in another environment imports it too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from storage import fork
from torch import Tensor, nn


@dataclass(frozen=True)
class Script:
    """What one copy of a cache is asked: `chunks` of given ids `[n]`, one forward each, then up to `new_tokens` greedy ones.

    The greedy ones end at the model's end token unless `stops` is False.
    """

    chunks: tuple[Tensor, ...]
    new_tokens: int = 0
    stops: bool = True


@dataclass(frozen=True)
class Reply:
    """Log-probabilities `[n, vocabulary]` after each token of each chunk, and the greedy ids."""

    log_probabilities: tuple[Tensor, ...]
    new_ids: tuple[int, ...]


@dataclass(frozen=True)
class Distance:
    """KL (nats) and equal top-1 of each token of each chunk against the reference, and the greedy ids."""

    kl: tuple[tuple[float, ...], ...]
    top1_equal: tuple[tuple[bool, ...], ...]
    new_ids: tuple[int, ...]


@torch.no_grad()
def replay(model: nn.Module, cache: Any, position: int, script: Script) -> Reply:
    """Ask a cache that holds `position` tokens; the cache is changed."""

    def forward(ids: Tensor) -> Tensor:
        nonlocal position
        # positions are given, because a cache with evicted tokens no longer knows them
        positions = torch.arange(position, position + len(ids))[None]
        position += len(ids)
        # the name that transformers in either environment takes
        logits = model(input_ids=ids[None], position_ids=positions, past_key_values=cache).logits[0]
        return logits.float().log_softmax(-1)

    scores = tuple(forward(chunk) for chunk in script.chunks)
    stop = model.generation_config.eos_token_id
    stop = ({stop} if isinstance(stop, int) else set(stop or ())) if script.stops else set()
    new_ids: list[int] = []
    last = scores[-1]
    while len(new_ids) < script.new_tokens:
        new_ids.append(int(last[-1].argmax()))
        if new_ids[-1] in stop or len(new_ids) == script.new_tokens:
            break
        last = forward(torch.tensor(new_ids[-1:]))
    return Reply(scores, tuple(new_ids))


def replay_all(model: nn.Module, cache: Any, position: int, scripts: Sequence[Script]) -> Iterable[Reply]:
    """Ask each script of a fresh copy of the cache, in turn."""
    for index, script in enumerate(scripts):
        last = index == len(scripts) - 1
        yield replay(model, cache if last else fork(cache), position, script)


def distance(reference: Reply, reply: Reply) -> Distance:
    """How far a reply is from the reference's."""
    kl, equal = [], []
    for wanted, got in zip(reference.log_probabilities, reply.log_probabilities, strict=True):
        kl.append(tuple((wanted.exp() * (wanted - got)).sum(-1).clamp_min(0).tolist()))
        equal.append(tuple((wanted.argmax(-1) == got.argmax(-1)).tolist()))
    return Distance(tuple(kl), tuple(equal), reply.new_ids)


def flat(parts: Iterable[Iterable[float]]) -> list[float]:
    """The values of nested sequences, in order."""
    return [float(value) for part in parts for value in part]


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; raises ZeroDivisionError for none."""
    values = list(values)
    return sum(values) / len(values)
