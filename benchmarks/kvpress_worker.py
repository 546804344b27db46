"""Runs kvpress' presses on the trials in a folder: `PYTHON kvpress_worker.py FOLDER` (see presses.py).

A press changes nothing before a layer's attention is done, so one prefill serves all presses that score during it; what each
keeps is set aside. KVzip scores by replaying the context once for all ratios.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Python would put this file's folder on the path, were it not told -P.
sys.path.append(str(Path(__file__).parent))

import torch
from kvpress import AdaKVPress, CompactorPress, ExpectedAttentionPress, KVzipPress, SnapKVPress
from kvpress.presses.base_press import BasePress
from replay import Reply, Script, distance, flat, mean, replay
from safetensors.torch import load_file
from storage import HalfStates, Held
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

SCORERS = {
    "AdaKV + ExpectedAttention": lambda ratio: AdaKVPress(ExpectedAttentionPress(ratio, epsilon=1e-2)),
    "ExpectedAttention": ExpectedAttentionPress,
    "Compactor": CompactorPress,
    "SnapKV": SnapKVPress,
}
EXACT = ("exact", 1)
# Rounding to 16 bits and another release's kernels; a model that was read wrongly is far off.
TOLERANCE = 1e-3


@dataclass
class Kept:
    """What a press leaves of each layer: states `[1, H_kv, T', D]`, or a mask over all of them; or why it failed."""

    states: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)
    reason: str | None = None


class Together(BasePress):
    """Several presses on the same exact states; the cache stays exact."""

    def __init__(self, presses: dict[Any, BasePress]) -> None:
        self.presses = presses
        self.kept = {key: Kept() for key in presses}

    def post_init_from_model(self, model: nn.Module) -> None:
        """Each press' own preparation."""
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(self, module: nn.Module, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any):
        """Set aside what each press keeps; returns everything."""
        for key, press in self.presses.items():
            kept = self.kept[key]
            module.masked_key_indices = None
            try:
                states = press.compress(module, hidden_states, keys, values, attentions, kwargs)
                kept.states[module.layer_idx], kept.masks[module.layer_idx] = states, module.masked_key_indices
            except Exception as error:
                kept.reason = f"{type(error).__name__}: {error}"
        module.masked_key_indices = None
        return keys, values


class KVzipAt(KVzipPress):
    """KVzip at several ratios from one scoring: `masks` per ratio and layer."""

    def compress_post(self, model: nn.Module) -> None:
        """Masks of each ratio from the same scores."""
        self.masks = {}
        for kept in self.denominators:
            self.compression_ratio = 1 - 1 / kept
            super().compress_post(model)
            self.masks[kept] = {
                layer.self_attn.layer_idx: layer.self_attn.masked_key_indices for layer in model.model.layers
            }


def prefill(model: nn.Module, press: BasePress, tensors: dict[str, torch.Tensor]) -> DynamicCache:
    """An exact cache of a trial's tokens, read under a press."""
    cache = DynamicCache()
    if "embeddings" in tensors:
        inputs = {"inputs_embeds": tensors["embeddings"]}
    else:
        inputs = {"input_ids": tensors["ids"][None]}
    with press(model):
        model(past_key_values=cache, logits_to_keep=1, **inputs)
    return cache


def states_of(cache: DynamicCache) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values by layer."""
    return {i: (layer.keys, layer.values) for i, layer in enumerate(cache.layers)}


def all_kept(model: nn.Module, job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[tuple[str, int], Kept]:
    """What every press leaves at every ratio, and under EXACT what was there."""
    chosen = [name for name in job["presses"] if name in SCORERS]
    together = Together({(name, kept): SCORERS[name](1 - 1 / kept) for name in chosen for kept in job["kept"]})
    states = states_of(prefill(model, together, tensors))
    kept = {EXACT: Kept(states, dict.fromkeys(states)), **together.kept}
    if "KVzip" in job["presses"]:
        try:
            kept |= kvzip_kept(model, job["kept"], tensors)
        except Exception as error:
            kept |= {("KVzip", n): Kept(reason=f"{type(error).__name__}: {error}") for n in job["kept"]}
    return kept


def kvzip_kept(
    model: nn.Module, denominators: list[int], tensors: dict[str, torch.Tensor]
) -> dict[tuple[str, int], Kept]:
    """What KVzip leaves; raises ValueError for pictures."""
    if "embeddings" in tensors:
        raise ValueError("KVzip replays the context as token ids; pictures have none")
    press = KVzipAt(compression_ratio=0.5)
    press.denominators = denominators
    states = states_of(prefill(model, press, tensors))
    return {("KVzip", kept): Kept(states, masks) for kept, masks in press.masks.items()}


@contextmanager
def masked(layers: Any, masks: dict[int, Any]) -> Iterator[None]:
    """Attention that leaves out the masked keys."""
    for layer in layers:
        layer.self_attn.masked_key_indices = masks[layer.self_attn.layer_idx]
    try:
        yield
    finally:
        for layer in layers:
            layer.self_attn.masked_key_indices = None


def held_bytes(kept: Kept, tokens: int) -> Held:
    """Bytes of the kept states in 16 bits; a masked entry frees a key and a value."""
    count = dense = 0
    for layer, (key, value) in kept.states.items():
        freed = len(kept.masks[layer][0]) if kept.masks[layer] is not None else 0
        entries = key.shape[0] * key.shape[1]
        sizes = key.shape[3] + value.shape[3]
        count += 2 * (entries * key.shape[2] - freed) * sizes
        dense += 2 * entries * tokens * sizes
    return Held(count, dense)


def measured(model: nn.Module, kept: Kept, trial: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Bytes of one press and the distances of its replies."""
    tokens = len(tensors["ids"])
    distances = []
    with masked(model.model.layers, kept.masks):
        for i, settings in enumerate(trial["scripts"]):
            cache = HalfStates(DynamicCache())
            for layer, (key, value) in sorted(kept.states.items()):
                cache.update(key, value, layer)
            count = range(settings["chunks"])
            script = Script(tuple(tensors[f"chunk.{i}.{j}"] for j in count), settings["new_tokens"])
            wanted = Reply(tuple(tensors[f"wanted.{i}.{j}"] for j in count), ())
            distances.append(asdict(distance(wanted, replay(model, cache, tokens, script))))
    is_masked = any(mask is not None for mask in kept.masks.values())
    return {"held": asdict(held_bytes(kept, tokens)), "distances": distances, "masked": is_masked}


def pressed(
    model: nn.Module, job: dict[str, Any], trial: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> list[dict]:
    """A row per press and ratio; all with a reason when the exact cache does not reproduce the exact replies."""
    found = all_kept(model, job, tensors)
    exact = measured(model, found.pop(EXACT), trial, tensors)
    off = mean(flat(part for one in exact["distances"] for part in one["kl"]))
    rows = []
    for (press, ratio), kept in found.items():
        reason = kept.reason if off < TOLERANCE else f"the exact cache here has KL {off:.2g} to the exact cache there"
        row = {"press": press, "kept": ratio, "reason": reason}
        if reason is None:
            try:
                row |= measured(model, kept, trial, tensors)
            except Exception as error:
                row["reason"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


@torch.no_grad()
def main(folder: Path) -> None:
    """All trials of a folder, to its results.json."""
    job = json.loads((folder / "job.json").read_text())
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    # KVzip looks for its tokenizer there
    model.config._name_or_path = str(folder / "model")
    results = []
    for index, trial in enumerate(job["trials"]):
        results.append(pressed(model, job, trial, load_file(folder / f"trial-{index}.safetensors")))
        print(f"pressed {index + 1} of {len(job['trials'])}", flush=True)
    (folder / "results.json").write_text(json.dumps({"trials": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
