"""One prompt, many caches: prefilled once, exactly, then asked the same scripts from every cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from replay import Distance, Reply, Script, distance, mean, replay_all
from storage import Held
from systems import System, all_tensors, dense_cache, filled, prefill, read
from torch import Tensor, nn

CHUNK = 1_024


@dataclass(frozen=True)
class Trial:
    """A prompt and what is asked of it.

    ids: `[T]`. inputs: further inputs of its prefill. vision: bool `[1, T]`, which tokens are a picture's. labels: what a row says
    about the trial.
    """

    labels: dict[str, Any]
    ids: Tensor
    scripts: tuple[Script, ...] = ()
    inputs: dict[str, Tensor] | None = None
    vision: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """What one system did in one trial: bytes and distances, or the reason why not."""

    family: str
    setting: str
    note: str = ""
    held: Held | None = None
    distances: tuple[Distance, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A trial with its exact keys and values, one pair `[1, H_kv, T, D]` a layer."""

    trial: Trial
    states: Sequence[tuple[Tensor, Tensor]]

    def ask(self, model: nn.Module, scripts: Sequence[Script]) -> list[Reply]:
        """Replies of the exact cache."""
        exact = System("exact", "", dense_cache, all_tensors)
        cache, _ = filled(exact, model, self.states, None)
        return list(replay_all(model, cache, len(self.trial.ids), scripts))

    def asking(self, scripts: Sequence[Script]) -> "Prompt":
        """The same prompt with these scripts."""
        return replace(self, trial=replace(self.trial, scripts=tuple(scripts)))


def prompt_of(model: nn.Module, trial: Trial) -> Prompt:
    """Prefill a trial's tokens; with pictures in one piece."""
    size = CHUNK if trial.inputs is None else len(trial.ids)
    return Prompt(trial, prefill(model, trial.ids, size, **(trial.inputs or {})))


@torch.no_grad()
def measure(model: nn.Module, prompt: Prompt, references: Sequence[Reply], systems: Sequence[System]) -> list[Measured]:
    """Every system on one prompt."""
    return [_measure(model, prompt, references, system) for system in systems]


def _measure(model: nn.Module, prompt: Prompt, references: Sequence[Reply], system: System) -> Measured:
    trial = prompt.trial
    try:
        model = system.model(model)
        if system.reads_prompt:
            cache, held = read(system, model, trial.ids, prompt.states, **(trial.inputs or {}))
        else:
            cache, held = filled(system, model, prompt.states, trial.vision)
        replies = replay_all(model, cache, len(trial.ids), trial.scripts)
        distances = tuple(distance(*pair) for pair in zip(references, replies, strict=True))
    # a peer may raise anything; the table says what it was
    except Exception as error:
        return Measured(system.family, system.setting, system.note, reason=f"{type(error).__name__}: {error}")
    return Measured(system.family, system.setting, system.note, held, distances)


def means(measured: Sequence[Measured]) -> dict[str, Any]:
    """Ratio and bytes of a system over several trials; the first reason when one failed."""
    reason = next((m.reason for m in measured if m.reason is not None), None)
    if reason is not None:
        return {
            "held_ratio": None,
            "sequence_bytes": None,
            "model_bytes": None,
            "decoded_bytes": None,
            "reason": reason,
        }
    held = [m.held for m in measured]
    return {
        "held_ratio": sum(h.dense_bytes for h in held) / sum(h.sequence_bytes for h in held),
        "sequence_bytes": round(mean(h.sequence_bytes for h in held)),
        "model_bytes": max(h.model_bytes for h in held),
        "decoded_bytes": round(mean(h.decoded_bytes for h in held)),
        "reason": None,
    }


def by_system(
    results: Sequence[tuple[Trial, Sequence[Measured]]],
) -> dict[tuple[str, str], list[tuple[Trial, Measured]]]:
    """Results regrouped: per system its trials, in order."""
    groups: dict[tuple[str, str], list[tuple[Trial, Measured]]] = {}
    for trial, measured in results:
        for one in measured:
            groups.setdefault((one.family, one.setting), []).append((trial, one))
    return groups
