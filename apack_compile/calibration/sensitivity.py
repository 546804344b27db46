"""How much a model's next tokens suffer when its cached keys and values are disturbed.

A prompt is read in two parts. The last few tokens play the tokens to come: they read the others from the cache, as decoding does,
and the gradient of their log-probabilities with respect to the cached states, with labels drawn from the model itself, has
the Fisher information as its second moment: a small disturbance e costs about E[(gradient . e)^2] / 2 nats of KL.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from apack_compile.calibration.differentiated_layers import Differentiation, Receive, unpack, whole_cache
from apack_compile.calibration.straight_through import straight_through
from apack_compile.models.cache_argument import takes_argument, with_cache
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

    states: K and V `[B, H_kv, T, D]`, the cache's own. queries: tokens that played those to come; 0 where none could. positions: what the
    model's rotary embedding was given, `[C, B, T]` or `[B, T]`; None where that was not seen. without_gradients: why there are none,
    and what to do instead. gradients: what draws them. rotations: how keys rotate back, as a packed cache has them.
    """

    states: Mapping[int, tuple[Tensor, Tensor]]
    queries: int
    positions: Tensor | None = None
    without_gradients: str | None = None
    gradients: "Gradients | None" = None
    rotations: Mapping[int, KeyRotation | None] = field(default_factory=dict)


class Gradients(Protocol):
    """Something that says how much its tokens' keys and values matter."""

    def draw(self, receive: Receive, layers: Collection[int]) -> str | None:
        """Call `receive` with layer, stream and gradient, for every draw, of these layers; why there are none, or None."""


@dataclass(frozen=True)
class Scored:
    """Logits `[B, queries, V]` of the tokens that play those to come, with their graph; hidden: bool `[B, queries]`, padding among them."""

    logits: Tensor
    hidden: Tensor | None
    shared: Differentiation

    def draw(self, receive: Receive, layers: Collection[int]) -> str | None:
        """Draw labels, and hand out the gradients of their log-probability, layer by layer; an error of `receive` is raised."""

        def wanted(layer: int, stream: int, gradient: Tensor) -> None:
            if layer in layers:
                receive(layer, stream, gradient)

        self.shared.receive, self.shared.error = wanted, None
        try:
            with torch.inference_mode(False), uncompiled():
                for seed in range(LABEL_DRAWS):
                    score = drawn_score(self.logits, self.hidden, seed)
                    torch.autograd.grad(score, self.shared.anchor, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if self.shared.error is not None and not isinstance(error, torch.OutOfMemoryError):
                raise
            return why_not(error)
        finally:
            self.shared.receive = self.shared.error = None
        return None


def observe(model: torch.nn.Module, batch: Mapping[str, Any], layers: Iterable[int]) -> Observation:
    """Run a model over one input, its last tokens so that `draw_gradients` can differentiate them by what they read from the cache.

    Without that, and with the reason, where the model cannot.
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
            return in_two_parts(model, batch, layers, queries)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            reason = why_not(error)
        # not while the error is handled: it keeps the memory of what failed
        return replace(states_alone(model, batch, layers), without_gradients=reason)


def why_not(error: RuntimeError) -> str:
    """Why a model has no gradients, by the error that came instead."""
    if isinstance(error, torch.OutOfMemoryError):
        return TOO_LARGE
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]}; {INSTEAD}"


def draw_gradients(seen: Observation, receive: Receive) -> str | None:
    """Hand out gradients by each layer's keys and values; why there are none, or None.

    receive: called for every draw, layer and stream with the gradient `[B, H_kv, cached, D]`, which is gone afterwards.
    """
    if seen.gradients is None:
        return seen.without_gradients
    found: list[bool] = []

    def received(layer: int, stream: int, gradient: Tensor) -> None:
        found.append(bool(gradient.any()))
        receive(layer, stream, gradient)

    reason = seen.gradients.draw(received, seen.states)
    return reason or (None if any(found) else f"all of them are 0; {INSTEAD}")


def states_alone(model: torch.nn.Module, batch: Mapping[str, Any], layers: list[int]) -> Observation:
    """Run a model over one input."""
    cache = whole_cache(model)
    with torch.no_grad(), seen_positions(model) as seen:
        model(**reading(model, batch, cache))
    return Observation(states_in(cache, layers), 0, seen[-1][1] if seen else None)


def reading(model: torch.nn.Module, batch: Mapping[str, Any], cache: DynamicCache) -> dict[str, Any]:
    """Arguments of a forward pass that fills a cache, makes as few logits as the model can, and no loss of them."""
    fewest = {"logits_to_keep": 1} if takes_argument(model, "logits_to_keep") else {}
    given = {name: x for name, x in batch.items() if name != "labels"}
    return with_cache(model, given, cache) | fewest | {"use_cache": True}


def in_two_parts(model: torch.nn.Module, batch: Mapping[str, Any], layers: list[int], queries: int) -> Observation:
    """Run a model over one input in two parts, with a graph from what the second reads from the first."""
    cache = whole_cache(model)
    read, following = split(batch, queries)
    with torch.no_grad(), seen_positions(model) as seen:
        model(**reading(model, read, cache))
    positions = seen[-1][1] if seen else None
    device = cache.layers[layers[0]].keys.device
    shared = Differentiation(torch.zeros((), device=device, requires_grad=True))
    for i in layers:
        cache.layers[i].expect_tokens(i, queries, shared)
    if positions is not None and positions.dim() == 3 and "position_ids" not in following:
        following |= positions_after(positions, batch, queries)
    kept = torch.autograd.graph.saved_tensors_hooks(shared.pack, unpack)
    with torch.enable_grad(), seen_positions(model) as seen, straight_through(model), kept:
        logits = model(**with_cache(model, following, cache) | {"use_cache": True}).logits
    # all positions, where a model's indexer needs them
    more = seen[-1][1][..., -queries:] if seen else None
    alike = positions is not None and more is not None and positions.shape[:-1] == more.shape[:-1]
    positions = torch.cat([positions, more], -1) if alike else None
    mask = following.get("attention_mask")
    hidden = None if mask is None else mask[:, -queries:] == 0
    return Observation(states_in(cache, layers), queries, positions, gradients=Scored(logits, hidden, shared))


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
    read = {name: x for name, x in columns_of(batch, slice(-queries)).items() if name != "cache_position"}
    names = ("input_ids", "inputs_embeds", "position_ids")
    newest = columns_of(batch, slice(-queries, None))
    following = {name: newest[name] for name in names if newest.get(name) is not None}
    following |= pictures_beside(batch, queries)
    if batch.get("attention_mask") is not None:
        following["attention_mask"] = batch["attention_mask"]
    return read, following


def columns_of(batch: Mapping[str, Any], where: slice) -> dict[str, Any]:
    """Model inputs of some columns of a batch's tokens; what is not of its tokens as it is."""
    shape = states_of(batch).shape[:2]

    def part(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if name == "position_ids":
            return x[..., where]
        return x[:, where] if x.shape[:2] == shape else x

    return {name: part(name, x) for name, x in batch.items()}


def pictures_beside(batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Inputs that `tokens` more tokens need in models which read the pictures again at every step (Idefics); else none."""
    mask = batch.get("image_attention_mask")
    if mask is None or batch.get("pixel_values") is None:
        return {}
    return {"pixel_values": batch["pixel_values"], "image_attention_mask": mask[:, -1:].expand(-1, tokens, -1)}


def states_of(batch: Mapping[str, Any]) -> Tensor:
    """The tokens of a batch: ids `[B, T]` or embeddings `[B, T, hidden]`."""
    return batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]


def drawn_score(logits: Tensor, hidden: Tensor | None, seed: int) -> Tensor:
    """The summed log-probability of labels drawn from `logits` `[B, n, V]` themselves; none are drawn where `hidden`, bool `[B, n]`."""
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    with torch.enable_grad():
        scores = logits.float().log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp().flatten(0, 1), 1, generator=generator)
        taken = scores.gather(-1, labels.view(*scores.shape[:2], 1))[..., 0]
        return (taken if hidden is None else taken.masked_fill(hidden, 0.0)).sum()
