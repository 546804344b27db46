"""Layers that a packed cache keeps as transformers has them, with addresses that a compiled decode step can rely on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from apack_compile.checks import counted

CROSS_ATTENTION = "cross_attention"
RowChange = Callable[[Tensor], Tensor]


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of pictures `[B, H_kv, N, D]`: written by eager passes, only read by a decode step."""

    is_compileable = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the states of more pictures; K and V of all."""
        super().update(key_states, value_states, *args, **kwargs)
        self.mark_static()
        return self.keys, self.values

    def reset(self) -> None:
        """Forget every picture, and the batch size."""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: what is removed is text."""

    def map_rows(self, change: RowChange) -> None:
        """Apply a change of the batch."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.mark_static()

    def mark_static(self) -> None:
        """Tell the compiler that these tensors keep their addresses while their number of tokens may differ."""
        for tensor in (self.keys, self.values):
            torch._dynamo.mark_static_address(tensor, guard=False)
            torch._dynamo.maybe_mark_dynamic(tensor, 2)


class LinearLayer(LinearAttentionLayer):
    """States of a linear attention or a short convolution: as many bytes for any number of tokens, written in place."""

    record_past: bool

    def map_rows(self, change: RowChange) -> None:
        """Apply a change of the batch."""
        for states in (self.conv_states, self.recurrent_states):
            for i, state in states.items():
                if state is not None:
                    states[i] = change(state)
                    torch._dynamo.mark_static_address(states[i], guard=False)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop what was recorded to remove tokens, where it was."""
        if self.record_past:
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget every token, and the batch size."""
        recording = self.record_past
        LinearAttentionLayer.__init__(self, self.number_of_states)
        self.record_past = recording


def kept_layer(layer: Any, layer_type: str) -> Any:
    """What a packed cache has in the place of a layer of `DynamicCache` that is not packed."""
    if layer_type == CROSS_ATTENTION:
        return CrossAttentionLayer()
    return LinearLayer(layer.number_of_states) if type(layer) is LinearAttentionLayer else layer


def map_rows(layer: Any, change: RowChange) -> None:
    """Apply a change of the batch to what a layer keeps beside packed tokens."""
    if hasattr(layer, "map_rows"):
        layer.map_rows(change)
    elif isinstance(layer, CacheLayerMixin) and isinstance(layer.keys, Tensor) and layer.is_initialized:
        layer.keys, layer.values = change(layer.keys), change(layer.values)


def has_linear_states(layer: Any) -> bool:
    """Whether a layer holds linear states, which are written in place: a chunk that fails cannot be taken out of them again."""
    return isinstance(layer, LinearAttentionLayer) and any(
        state is not None for states in (layer.conv_states, layer.recurrent_states) for state in states.values()
    )


def why_not_cropped(layer: Any) -> str | None:
    """Why a layer cannot give up its newest tokens; None where it can.

    Recurrent states are sums, convolutions keep their last inputs alone, and a window its last tokens.
    """
    if isinstance(layer, LinearAttentionLayer) and (
        any(layer.is_recurrent_states_initialized.values())
        or (any(layer.is_conv_states_initialized.values()) and not layer.record_past)
    ):
        return "linear states"
    if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
        return "full window" if layer.get_seq_length() >= layer.sliding_window else None
    return None


def check_cropped(layers: Sequence[Any], tokens: int) -> None:
    """Raise ValueError where a layer that is not packed cannot give up its newest tokens."""
    stuck: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        if (why := why_not_cropped(layer)) is not None:
            stuck.setdefault(why, []).append(i)
    for why, those in stuck.items():
        raise ValueError(
            f"crop: cannot remove {counted(tokens, 'token')}; the {why} of layers {', '.join(map(str, those))} cannot go back"
        )
