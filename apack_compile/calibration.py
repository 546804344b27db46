"""Statistics of a model's keys and values, from forward passes over calibration inputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache

from apack_compile.basis import Moments, Spectrum, fit, fit_steps
from apack_compile.kernels.layout import to_groups
from apack_compile.modality import padding_of, vision_of
from apack_compile.plan import FIRST_LAYER_VALUES, FIRST_TOKENS, LOGIT_NOISE_WEIGHT, MODALITIES, StreamStatistics

# Steps are fitted to these: with 512 the tails were missed, and clipping there cost more than all else (docs/quality.md).
SAMPLE_TOKENS = 2_048

Statistics = dict[int, dict[str, tuple[StreamStatistics, StreamStatistics]]]


@dataclass
class RunningMoments:
    """Sums over tokens `[G, N, W_g]`, taken around the first batch's mean, and an even sample of the tokens."""

    count: int = 0
    center: Tensor | None = None
    total: Tensor | None = None
    gram: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Add tokens."""
        x = x.float()
        if self.center is None:
            self.center = x.mean(1)
            self.total = torch.zeros_like(self.center)
            self.gram = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
        shifted = x - self.center[:, None]
        self.count += x.shape[1]
        self.total += shifted.sum(1)
        self.gram += shifted.mT @ shifted
        self.sample.append(x[:, :: max(x.shape[1] // SAMPLE_TOKENS, 1)])

    def finish(self) -> Moments:
        """Moments with a leading dimension of 1 (one basis for all sequences)."""
        shift = self.total / self.count
        covariance = self.gram / self.count - shift[:, :, None] * shift[:, None]
        count = torch.full((1, len(shift)), self.count, device=shift.device)
        return Moments(count, (self.center + shift)[None], covariance[None])


class QueryMoments(TorchFunctionMode):
    """Second moment `[H_kv, D, D]` of the scaled queries of each layer, seen at scaled_dot_product_attention.

    A site belongs to the layer whose cache was updated last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer: int | None = None
        self.kv_heads = 0
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def updated(self, layer: int, kv_heads: int) -> None:
        """The next attention is this layer's."""
        self.layer, self.kv_heads = layer, kv_heads

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.layer is not None:
            query = args[0] if args else kwargs["query"]
            scale = kwargs.get("scale")
            self._add(query.detach().float() * (query.shape[-1] ** -0.5 if scale is None else scale))
        return func(*args, **kwargs)

    def _add(self, query: Tensor) -> None:
        layer, heads = self.layer, self.kv_heads
        self.layer = None
        if query.dim() != 4 or query.shape[1] % heads:
            return
        rows = query.transpose(0, 1).reshape(heads, -1, query.shape[3])
        self.sums[layer] = self.sums.get(layer, 0) + rows.mT @ rows
        self.counts[layer] = self.counts.get(layer, 0) + rows.shape[1]

    def of(self, layer: int) -> Tensor | None:
        """Second moment of one layer's queries, None if its attention was not seen."""
        return self.sums[layer] / self.counts[layer] if layer in self.sums else None


class WatchedCache(DynamicCache):
    """A dense cache that tells which layer is updated."""

    def __init__(self, config: Any, watch: QueryMoments) -> None:
        super().__init__(config=config)
        self.watch = watch

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self.watch.updated(layer_idx, key_states.shape[1])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def collect(
    model: torch.nn.Module,
    layers: Iterable[int],
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    groups: int = 1,
) -> Statistics:
    """Statistics of the given layers, by modality, over model inputs (dictionaries with at least `input_ids`).

    Raises ValueError when no input has a usable token (padding and the first tokens are left out).
    """
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    layers = list(layers)
    watch = QueryMoments()
    running: dict[tuple[int, str, int], RunningMoments] = {}
    for batch in batches:
        cache = WatchedCache(model.config.get_text_config(decoder=True), watch)
        with torch.no_grad(), watch:
            model(**{**batch, "past_key_values": cache, "use_cache": True})
        chosen = usable_tokens(model.config, batch, cache.layers[layers[0]].keys)
        for layer in layers:
            for stream, states in enumerate((cache.layers[layer].keys, cache.layers[layer].values)):
                x = to_groups(states, groups).transpose(0, 1)
                for modality in MODALITIES:
                    tokens = x[:, chosen[modality]]
                    if tokens.shape[1]:
                        running.setdefault((layer, modality, stream), RunningMoments()).add(tokens)
    if not running:
        raise ValueError(
            f"inputs: {len(batches)} calibration inputs hold no usable token (only padding or first tokens)"
        )
    for layer in layers:
        for stream in range(2):
            if (layer, "text", stream) not in running:
                running[layer, "text", stream] = running[layer, "vision", stream]
    return {
        layer: {
            modality: (
                finish_key(running[layer, modality, 0], watch.of(layer), groups, LOGIT_NOISE_WEIGHT[modality]),
                finish_value(running[layer, modality, 1], FIRST_LAYER_VALUES if layer == 0 else 1.0),
            )
            for modality in MODALITIES
            if (layer, modality, 0) in running
        }
        for layer in layers
    }


def usable_tokens(config: Any, batch: Mapping[str, Any], keys: Tensor) -> dict[str, Tensor]:
    """Bool `[B, T]` per modality: its tokens, without padding and each row's first tokens."""
    rows, tokens = keys.shape[0], keys.shape[2]
    none = torch.zeros(rows, tokens, dtype=torch.bool, device=keys.device)
    padding = padding_of(batch, tokens)
    vision = vision_of(config, batch)
    vision = none if vision is None or vision.shape != none.shape else vision
    real = ~(none if padding is None else padding)
    usable = real & (real.cumsum(1) > FIRST_TOKENS)
    return {"vision": usable & vision, "text": usable & ~vision}


def finish_value(running: RunningMoments, weight: float) -> StreamStatistics:
    """Spectrum of a value stream; the harm of dropping a component is its share of the variance, weighted."""
    spectrum = finish_spectrum(running)
    variance = spectrum.deviation[0].square()
    return StreamStatistics(spectrum, weight * variance / variance.sum())


def finish_key(running: RunningMoments, query_moment: Tensor | None, groups: int, weight: float) -> StreamStatistics:
    """Spectrum of a key stream; the harm of dropping a component is the variance it gives to the logits, weighted.

    That is a mean over heads; where the queries were not seen, it is the component's share of the variance.
    """
    if query_moment is None:
        return finish_value(running, 1.0)
    spectrum = finish_spectrum(running)
    heads, head_dim = query_moment.shape[:2]
    rows = spectrum.rows[0].unflatten(-1, (heads // groups, head_dim))
    moment = query_moment.unflatten(0, (groups, heads // groups))
    noise = torch.einsum("grhd,ghde,grhe->gr", rows, moment, rows)
    return StreamStatistics(spectrum, weight / heads * noise * spectrum.deviation[0].square())


def finish_spectrum(running: RunningMoments) -> Spectrum:
    """Spectrum of a stream, with steps that serve an even sample of its tokens best."""
    sample = torch.cat(running.sample, dim=1)
    sample = sample[:, :: max(sample.shape[1] // SAMPLE_TOKENS, 1)]
    return fit_steps(fit(running.finish()), sample[None], token_scale=True)
