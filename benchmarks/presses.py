"""kvpress beside the other systems, in an environment of its own: its pins exclude the transformers that this project needs.

The language model, prompts (with pictures: as embeddings), scripts and the exact replies go to a folder; `kvpress_worker.py`
prefills with its presses, asks the same scripts and leaves bytes and distances as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Measured, Trial
from replay import Distance, Reply
from safetensors.torch import save_file
from storage import Held
from torch import Tensor, nn
from transformers import LlamaForCausalLM

WORKER = Path(__file__).with_name("kvpress_worker.py")
KEPT = (2, 4, 8, 16)
# The presses that its leaderboard puts first among those that need no training, and SnapKV, which the field compares with.
PRESSES = ("KVzip", "AdaKV + ExpectedAttention", "ExpectedAttention", "Compactor", "SnapKV")
NO_KVPRESS = "pass --kvpress-python, an environment with kvpress"
MASKED = "evicted by mask, counted as freed"


@dataclass
class PressJob:
    """Trials written so far for the worker."""

    python: Path
    folder: Path
    trials: list[dict[str, Any]] = field(default_factory=list)


def embeddings_of(model: nn.Module, trial: Trial) -> Tensor:
    """What the language model reads of a prompt with pictures, `[1, T, hidden]`."""
    read: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
        read.append(kwargs["inputs_embeds"])

    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(input_ids=trial.ids[None], logits_to_keep=1, use_cache=False, **trial.inputs)
    finally:
        hook.remove()
    return read[0]


def language_model(model: nn.Module) -> LlamaForCausalLM:
    """The demo model's language model alone, over the same weights."""
    with torch.device("meta"):
        alone = LlamaForCausalLM(model.config.text_config)
    alone.model, alone.lm_head = model.model.language_model, model.lm_head
    alone.generation_config = model.generation_config
    return alone


def add_trial(job: PressJob, model: nn.Module, trial: Trial, references: Sequence[Reply]) -> None:
    """Write one trial and the exact replies to it."""
    tensors = {"ids": trial.ids.contiguous()}
    if trial.inputs is not None:
        tensors["embeddings"] = embeddings_of(model, trial).contiguous()
    scripts = []
    for i, (script, reply) in enumerate(zip(trial.scripts, references, strict=True)):
        for j, (chunk, wanted) in enumerate(zip(script.chunks, reply.log_probabilities, strict=True)):
            tensors |= {f"chunk.{i}.{j}": chunk.clone(), f"wanted.{i}.{j}": wanted.contiguous()}
        scripts.append({"chunks": len(script.chunks), "new_tokens": script.new_tokens})
    save_file(tensors, job.folder / f"trial-{len(job.trials)}.safetensors")
    job.trials.append({"scripts": scripts})


def run_presses(job: PressJob, model: nn.Module, tokenizer: Any) -> list[list[Measured]]:
    """Every press on every trial, in the trials' order; when the worker fails as a whole, its error as every row's reason."""
    language_model(model).save_pretrained(job.folder / "model")
    # KVzip would take the template's first tokens for part of every context
    tokenizer.chat_template = None
    tokenizer.save_pretrained(job.folder / "model")
    settings = {"trials": job.trials, "presses": PRESSES, "kept": KEPT}
    (job.folder / "job.json").write_text(json.dumps(settings))
    command = [str(job.python), "-P", str(WORKER), str(job.folder)]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return [not_run(f"the worker failed: {reason}")] * len(job.trials)
    return [
        [_measured(one) for one in trial] for trial in json.loads((job.folder / "results.json").read_text())["trials"]
    ]


def not_run(reason: str) -> list[Measured]:
    """A row per press that says why there are no figures."""
    return [Measured(f"kvpress {press}", "", reason=reason) for press in PRESSES]


def _measured(one: dict[str, Any]) -> Measured:
    family, setting = f"kvpress {one['press']}", f"1/{one['kept']} kept"
    if one["reason"] is not None:
        return Measured(family, setting, reason=one["reason"])
    distances = tuple(Distance(d["kl"], d["top1_equal"], tuple(d["new_ids"])) for d in one["distances"])
    return Measured(family, setting, MASKED if one["masked"] else "", Held(**one["held"]), distances)


def press_versions(python: Path | None) -> tuple[dict[str, str], str | None]:
    """kvpress and its transformers in the other environment, or the reason why the presses cannot run."""
    if python is None:
        return {}, NO_KVPRESS
    code = (
        "import json; from importlib.metadata import version as v;"
        "print(json.dumps({'kvpress': v('kvpress'), 'kvpress_transformers': v('transformers')}))"
    )
    done = subprocess.run([str(python), "-P", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or ["it does not start"])[-1]
    return json.loads(done.stdout), None
