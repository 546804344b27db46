"""Relative keys: a key is turned back to where its block of slots starts, so that one basis serves every position.

A rotary embedding gives the token at position p the key R(p) k. Stored is R(-anchor) R(p) k = R(p - anchor) k, where the anchor
is the position of the first slot of the token's block. R is orthogonal, so a score is exact whatever R is: a query is turned back
by each block's anchor instead. Frequencies that are not the model's cost quality, never correctness.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from apack_compile.kernels.turns import deinterleaved, turned
from apack_compile.sensitivity import pictures_beside
from apack_compile.uncompiled import uncompiled

# Slots that share an anchor by default. Fewer serve the basis better, and cost a query more turns (docs/quality.md).
BLOCK = 64
PROBE_TOKENS = 32
# Largest relative difference of keys that are the same key turned; rounding to bfloat16 over many layers stays below.
TURN_TOLERANCE = 0.05


@dataclass(frozen=True)
class KeyTurn:
    """How keys turn with their position.

    frequencies: radians a position, float32 `[P]`; component i of a head turns with component i + P or, interleaved, component 2 i
    with 2 i + 1. block: slots that share an anchor.
    """

    frequencies: Tensor
    block: int
    interleaved: bool = False

    @property
    def interleaved_pairs(self) -> int:
        """Pairs (2 i, 2 i + 1) of components that turn; 0 where pairs are not interleaved."""
        return len(self.frequencies) if self.interleaved else 0


def deinterleaved_keys(states: Tensor, turn: KeyTurn | None) -> Tensor:
    """The model's keys `[..., D]` as a packed cache has them: interleaved pairs at i and i + P, all others as they come.

    A score does not change where queries are put so as well; so whatever turns keys knows one order of components.
    """
    return deinterleaved(states, turn.interleaved_pairs) if turn is not None and turn.interleaved else states


def turns_at(anchors: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine `[..., 2, P]` of the angles at positions `[...]`, float32."""
    angles = anchors.double()[..., None] * frequencies.double()
    return torch.stack([angles.cos(), angles.sin()], dim=-2).float()


def turns_of_blocks(positions: Tensor, start: Tensor, turn: KeyTurn) -> Tensor:
    """Turns `[B, blocks, 2, P]` of the blocks of slots that hold `positions` `[B, N]`; `start` `[B, 1]` has the angle 0.

    One block more than needed: a dimension of 1 would be compiled as a constant.
    """
    anchors = torch.nn.functional.pad(positions[:, :: turn.block], (0, 2 - min(positions.shape[1], 1)), value=-1)
    return turns_at(anchors.clamp_min(0) - start, turn.frequencies)


def rotary_start(padding: Tensor) -> Tensor:
    """Position `[B, 1]` of each row's first real token, where transformers' positions start; padding: bool `[B, T]`."""
    return (~padding).to(torch.uint8).argmax(1, keepdim=True)


def find_turn(
    model: nn.Module, layers: Iterable[int], batch: Mapping[str, Any], block: int
) -> tuple[KeyTurn | None, str]:
    """How the keys of these layers turn, or None; and why.

    In a prompt of one repeated token all values are the same, so every position has the same hidden state, and keys differ by
    their rotation alone. The frequencies are those of the model's own buffers that explain it in every layer.
    """
    if block == 0:
        return None, "stored as they are: key_block=0"
    if "mrope_section" in str(model.config.get_text_config(decoder=True).to_dict()):
        return None, "stored as they are: positions of vision tokens have several coordinates"
    known = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq") and buffer.dim() == 1}
    if not known:
        return None, "stored as they are: the model has no rotary frequencies"
    keys = keys_of_one_token(model, layers, batch)
    ways = [
        (name, KeyTurn(frequencies.float().clone(), block, interleaved=interleaved))
        for name, frequencies in known.items()
        for interleaved in (False, True)
    ]
    errors = [turning_error([deinterleaved_keys(k, turn) for k in keys], turn.frequencies) for _, turn in ways]
    name, turn = ways[errors.index(min(errors))]
    if not min(errors) < TURN_TOLERANCE:
        if turning_error(keys, torch.zeros(1)) < TURN_TOLERANCE:
            return None, "stored as they are: they do not turn with their position"
        return None, f"stored as they are: they do not turn by {name} alone (relative difference {min(errors):.2g})"
    pairs = " in interleaved pairs" if turn.interleaved else ""
    return turn, f"turned back to the start of their {block} slots, by {name}{pairs}"


def keys_of_one_token(model: nn.Module, layers: Iterable[int], batch: Mapping[str, Any]) -> list[Tensor]:
    """Keys `[H_kv, T, D]` per layer for a prompt that repeats the last token of `batch`."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    name = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    last = batch[name][:1, -1:]
    with torch.inference_mode(False), torch.no_grad(), uncompiled():
        repeated = last.clone().expand(-1, PROBE_TOKENS, *last.shape[2:])
        beside = {key: x[:1].clone() for key, x in pictures_beside(batch, PROBE_TOKENS).items()}
        model(**{name: repeated, **beside, "past_key_values": cache, "use_cache": True})
    return [cache.layers[i].keys[0] for i in layers]


def turning_error(keys: list[Tensor], frequencies: Tensor) -> float:
    """Largest relative difference, over layers, between the first key and the others turned back to it; inf where they cannot turn."""
    if any(2 * len(frequencies) > k.shape[-1] for k in keys):
        return float("inf")
    positions = torch.arange(keys[0].shape[1], device=frequencies.device)
    turns = turns_at(positions, frequencies)
    errors = []
    for k in keys:
        still = turned(k.float(), turns.to(k.device), back=True)
        first = still[:, :1]
        errors.append(float((still - first).norm(dim=-1).amax() / first.norm(dim=-1).amax().clamp_min(1e-12)))
    return max(errors)
