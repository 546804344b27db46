"""How much a model's next tokens suffer when its cached keys and values are disturbed.

A prompt is read in two parts. The last few tokens play the tokens to come: they read the others from the cache, as decoding does,
and the gradient of their log-probabilities with respect to the cached states, with labels drawn from the model itself, has
the Fisher information as its second moment: a small disturbance e costs about E[(gradient . e)^2] / 2 nats of KL.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from apack_compile.calibration.straight_through import straight_through
from apack_compile.models.cache_argument import with_cache
from apack_compile.models.coordinates import seen_positions
from apack_compile.models.modality import padding_of, vision_of
from apack_compile.models.uncompiled import uncompiled
from apack_compile.plan.rotation import KeyRotation

QUERY_TOKENS = 128
# Of a short prompt, at most this part plays the tokens to come.
QUERY_SHARE = 1 / 8
LABEL_DRAWS = 2
INSTEAD = "calibrate before the weights are quantized or made in inference mode, or optimize with a plan of a model that has gradients"
TOO_LARGE = "they do not fit into the device's memory; calibrate on shorter inputs, or optimize with a plan made on a larger device"
TOO_SHORT = "no token of the inputs can play those to come; calibrate on longer ones, with text behind their pictures"


@dataclass(frozen=True)
class Observation:
    """One calibration input as the model saw it, per layer.

    states: K and V `[B, H_kv, T, D]`. gradients: of K and V, one `[B, H_kv, cached, D]` per draw of labels; none where no
    token could play the tokens to come. queries: tokens that did. positions: what the model's rotary embedding was given,
    `[C, B, T]` or `[B, T]`; None where that was not seen. without_gradients: why there are none, and what to do instead. rotations: how
    keys rotate, where they are as a packed cache has them.
    """

    states: Mapping[int, tuple[Tensor, Tensor]]
    gradients: Mapping[int, tuple[list[Tensor], list[Tensor]]]
    queries: int
    positions: Tensor | None = None
    without_gradients: str | None = None
    rotations: Mapping[int, KeyRotation | None] = field(default_factory=dict)


class WholeLayer(DynamicLayer):
    """A dense layer with a window that keeps every token; the model's mask hides those out of the window."""

    is_sliding = True


class WholeHybridLayer(LinearAttentionAndFullAttentionLayer):
    """The same with linear states beside it."""

    is_sliding = True


def whole_cache(model: torch.nn.Module) -> DynamicCache:
    """A dense cache that keeps every token, also where layers see only the newest."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = WholeLayer()
        elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            cache.layers[i] = WholeHybridLayer(number_of_states=layer.number_of_states)
    return cache


def observe(model: torch.nn.Module, batch: Mapping[str, Any], layers: Iterable[int]) -> Observation:
    """Run a model over one input and differentiate its last tokens by what they read from the cache.

    Without gradients, and with the reason, where the model has none: layers without a backward, or such that round.
    """
    layers = list(layers)
    # generate may run this in inference mode, whose tensors cannot be differentiated
    with torch.inference_mode(False), uncompiled():
        batch = {name: x.clone() if isinstance(x, Tensor) else x for name, x in batch.items()}
        padding = padding_of(batch, states_of(batch).shape[1])
        # generate may have prepared masks for another cache; two dimensions serve any, and none is needed where nothing is hidden
        batch.pop("attention_mask", None)
        if padding is not None:
            batch["attention_mask"] = (~padding).long()
        queries = query_tokens(model.config, batch)
        if queries == 0:
            return replace(states_alone(model, batch, layers), without_gradients=TOO_SHORT)
        try:
            seen = with_gradients(model, batch, layers, queries)
        except torch.OutOfMemoryError:
            reason = TOO_LARGE
        except RuntimeError as error:
            reason = f"{(str(error).strip() or type(error).__name__).splitlines()[0]}; {INSTEAD}"
        else:
            reason = None
        # not while the error is handled: it keeps the memory of what failed
        if reason is not None:
            return replace(states_alone(model, batch, layers), without_gradients=reason)
    if any(bool(g.any()) for both in seen.gradients.values() for drawn in both for g in drawn):
        return seen
    return replace(seen, gradients={}, queries=0, without_gradients=f"all of them are 0; {INSTEAD}")


def states_alone(model: torch.nn.Module, batch: Mapping[str, Any], layers: list[int]) -> Observation:
    """Run a model over one input."""
    cache = whole_cache(model)
    with torch.no_grad(), seen_positions(model) as seen:
        model(**with_cache(model, batch, cache) | {"use_cache": True})
    return Observation(states_in(cache, layers), {}, 0, seen[-1][1] if seen else None)


def with_gradients(model: torch.nn.Module, batch: Mapping[str, Any], layers: list[int], queries: int) -> Observation:
    """Run a model over one input in two parts and differentiate the second by what it reads from the first."""
    cache = whole_cache(model)
    read, following = split(batch, queries)
    with torch.no_grad(), seen_positions(model) as seen:
        model(**with_cache(model, read, cache) | {"use_cache": True})
    positions = seen[-1][1] if seen else None
    leaves = []
    for layer in (cache.layers[i] for i in layers):
        layer.keys, layer.values = layer.keys.detach().requires_grad_(), layer.values.detach().requires_grad_()
        leaves += [layer.keys, layer.values]
    if positions is not None and positions.dim() == 3 and "position_ids" not in following:
        following |= positions_after(positions, batch, queries)
    with torch.enable_grad(), seen_positions(model) as seen, straight_through(model):
        logits = model(**with_cache(model, following, cache) | {"use_cache": True}).logits
    # all positions, where a model's indexer needs them
    more = seen[-1][1][..., -queries:] if seen else None
    alike = positions is not None and more is not None and positions.shape[:-1] == more.shape[:-1]
    positions = torch.cat([positions, more], -1) if alike else None
    mask = following.get("attention_mask")
    hidden = None if mask is None else mask[:, -queries:] == 0
    drawn = [gradients_of(logits, leaves, hidden, seed) for seed in range(LABEL_DRAWS)]
    found = dict(zip(product(layers, "kv"), map(list, zip(*drawn, strict=True)), strict=True))
    gradients = {i: (found[i, "k"], found[i, "v"]) for i in layers}
    return Observation(states_in(cache, layers), gradients, queries, positions)


def states_in(cache: DynamicCache, layers: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """K and V of some layers of a cache."""
    return {i: (cache.layers[i].keys.detach(), cache.layers[i].values.detach()) for i in layers}


def positions_after(positions: Tensor, batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Positions `[C, B, tokens]` of a batch's last tokens, as generate would pass them, after `positions` `[C, B, T]` of the others.

    Left to themselves, models whose positions have several coordinates count the attention mask from its beginning. Nothing where
    the positions are not of this batch's tokens.
    """
    rows, length = states_of(batch).shape[:2]
    if positions.shape[1:] not in ((1, length - tokens), (rows, length - tokens)):
        return {}
    after = positions[..., -1:].amax(0, keepdim=True) + 1 + torch.arange(tokens, device=positions.device)
    return {"position_ids": after.expand(len(positions), -1, -1)}


def query_tokens(config: Any, batch: Mapping[str, Any]) -> int:
    """How many of the last tokens can play the tokens to come: none of them vision."""
    tokens = states_of(batch).shape[1]
    count = min(QUERY_TOKENS, int(tokens * QUERY_SHARE))
    vision = vision_of(config, batch)
    if vision is not None and bool(vision.any()):
        count = min(count, tokens - 1 - int(vision.any(0).nonzero().max()))
    return count


def split(batch: Mapping[str, Any], queries: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model inputs of all tokens but the last `queries`, and of those, as decoding would pass them."""
    if queries == 0:
        return dict(batch), {}
    rows, tokens = states_of(batch).shape[:2]

    def part(name: str, x: Any, where: slice) -> Any:
        if not isinstance(x, Tensor):
            return x
        if name == "position_ids":
            return x[..., where]
        return x[:, where] if x.shape[:2] == (rows, tokens) else x

    read = {name: part(name, x, slice(-queries)) for name, x in batch.items() if name != "cache_position"}
    names = ("input_ids", "inputs_embeds", "position_ids")
    following = {name: part(name, batch[name], slice(-queries, None)) for name in names if batch.get(name) is not None}
    following |= pictures_beside(batch, queries)
    if batch.get("attention_mask") is not None:
        following["attention_mask"] = batch["attention_mask"]
    return read, following


def pictures_beside(batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Inputs that `tokens` more tokens need in models which read the pictures again at every step (Idefics); else none."""
    mask = batch.get("image_attention_mask")
    if mask is None or batch.get("pixel_values") is None:
        return {}
    return {"pixel_values": batch["pixel_values"], "image_attention_mask": mask[:, -1:].expand(-1, tokens, -1)}


def states_of(batch: Mapping[str, Any]) -> Tensor:
    """The tokens of a batch: ids `[B, T]` or embeddings `[B, T, hidden]`."""
    return batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]


def gradients_of(logits: Tensor, leaves: list[Tensor], hidden: Tensor | None, seed: int) -> list[Tensor]:
    """Gradient of the summed log-probability of drawn labels by each leaf; zeros where the output does not depend on one."""
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    with torch.enable_grad():
        scores = logits.float().log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp().flatten(0, 1), 1, generator=generator)
        taken = scores.gather(-1, labels.view(*scores.shape[:2], 1))[..., 0]
        if hidden is not None:
            taken = taken.masked_fill(hidden, 0.0)
        found = torch.autograd.grad(taken.sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
