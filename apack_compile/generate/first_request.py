"""A first request that nothing was calibrated for: read once, as every other, and packed with bases of its own keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.held_back import HeldBack
from apack_compile.calibration.attention_harm import Read, Reads, read_of
from apack_compile.calibration.calibrate import (
    FoundRotation,
    fitted_to,
    key_block_for,
    rotation_by_layer,
    rotations_of,
)
from apack_compile.calibration.collect import Observations, collect_by_layer, usable_tokens
from apack_compile.calibration.sensitivity import QUERY_SHARE, Observation, states_of
from apack_compile.config import AttentionPackConfig
from apack_compile.generate.session import Session, first_request_error
from apack_compile.plan.coarse_rule import tells_apart
from apack_compile.plan.source import NEWEST_ATTENTION, Calibration

# Tokens that play those to come, and random directions of what each gets: more cost time and gain nothing that is seen beside
# the scatter (docs/notes/quality.md, "Without gradients").
QUERIES, DIRECTIONS = 64, 1


@dataclass
class FirstPrompt:
    """A first prompt while it is read.

    queries: tokens that play those to come, int64 `[B, Q]`, -1 for none. rotations: how keys rotate, by window. reads: what the
    queries read, by layer. config: the model's, with the slots that share an anchor.
    """

    model: nn.Module
    batch: Mapping[str, Any]
    queries: Tensor
    rotations: Mapping[int | None, FoundRotation]
    config: AttentionPackConfig
    reads: dict[int, Read] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return states_of(self.batch).shape[1]

    @property
    def has_coordinates(self) -> bool:
        """Whether keys rotate by several coordinates, which the cache must be shown."""
        return any(rotation is not None and rotation.coordinates is not None for rotation, _ in self.rotations.values())

    def see(self, layer: int, named: dict[str, Any]) -> None:
        """Keep what the queries read in a layer's first attention; of another shape than queries of this prompt, nothing."""
        query = named["query"]
        fits = query.dim() == 4 and query.shape[2] == self.tokens
        if fits and self.queries.shape[1] and layer not in self.reads:
            self.reads[layer] = read_of(named, self.queries.clamp_min(0).to(query.device))

    def calibration(self, session: Session, cache: CompactedCache) -> Calibration:
        """What the prompt tells of the model."""
        states = cache.held_back.states
        reads = Reads(self.reads, states, self.queries < 0, DIRECTIONS)
        seen = Observation(states, self.queries.shape[1], cache.incoming.shown, gradients=reads)
        layers, rotation = session.source.layers, rotation_by_layer(session.source.layers, self.rotations)
        observations = Observations(self.model, sorted(rotation), self.batch, rotation, seen)
        config = self.config
        if not tells_apart(session.ratio, self.tokens):
            config = replace(config, coarse=())
        return fitted_to(
            self.model,
            layers,
            observations,
            self.rotations,
            config,
            "the first request",
            NEWEST_ATTENTION,
            collect_by_layer,
        )


def begin(session: Session, model: nn.Module, batch: Mapping[str, Any], cache: CompactedCache) -> FirstPrompt:
    """Before the prompt is read: hold its states back; raises ValueError for one that is too short."""
    states = states_of(batch)
    usable = usable_tokens(model.config, batch, states[:, None, :, None] if states.dim() == 2 else states[:, None])
    if not any(bool(flags.any()) for flags in usable.values()):
        raise first_request_error(session.ratio, "no usable token: only padding or first tokens")
    with session.own_passes(), torch.inference_mode(False), torch.no_grad():
        block = key_block_for(model, session.source.layers, session.config)
        config = replace(session.config, key_block=block)
        rotations = rotations_of(model, session.source.layers, batch, config)
    prompt = FirstPrompt(model, batch, queries_of(usable), rotations, config)
    cache.held_back = HeldBack(prompt)
    return prompt


def queries_of(usable: Mapping[str, Tensor]) -> Tensor:
    """A row's newest text tokens, int64 `[B, Q]`, -1 where it has fewer; its newest tokens if none are text.

    usable: bool `[B, T]` by modality.
    """
    text = usable["text"]
    chosen = torch.where(text.any(1, keepdim=True), text, usable["vision"])
    at = torch.arange(text.shape[1], device=text.device).where(chosen, -1)
    return at.topk(min(int(text.shape[1] * QUERY_SHARE), QUERIES), dim=1).values


def finish(session: Session, cache: CompactedCache) -> None:
    """After it: fit bases to the states, and pack them; however that ends early, the cache is as it was before the prompt."""
    prompt, states = cache.held_back.prompt, cache.held_back.states
    missing = [str(layer.layer_idx) for layer in cache.packed_layers if layer.layer_idx not in states]
    try:
        cache.held_back.checks.read()
        if missing:
            raise ValueError(
                f"layers {', '.join(missing)} stored nothing in the first forward pass; call calibrate first"
            )
        with session.lock, torch.inference_mode(False), torch.no_grad():
            # another thread's first request may have been faster
            if session.source.needs_calibration:
                session.take(prompt.calibration(session, cache))
        cache.groups.source = session.newest(cache.groups.source)
        cache.pack_held_back()
    except BaseException:
        cache.recover()
        raise
