"""A packed layer with linear states beside its keys and values, as in Inkling and Falcon-H1."""

from typing import Any

from transformers.cache_utils import LinearAttentionLayer

from apack_compile.cache.kept_layers import LinearLayer
from apack_compile.cache.layer import CompactedLayer
from apack_compile.cache.shared_index import SharedIndex


class HybridLayer(LinearLayer, CompactedLayer):
    """Keys and values are packed, the states of convolutions and recurrences are kept as transformers has them."""

    def __init__(self, layer_idx: int, index: SharedIndex, number_of_states: int) -> None:
        CompactedLayer.__init__(self, layer_idx, index)
        LinearAttentionLayer.__init__(self, number_of_states)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a decode step can be compiled: not with a window, for which transformers prepares masks that have none."""
        return self.index.window is None and not self.record_past

    def lazy_initialization(self, *states: Any, **linear: Any) -> None:
        """Empty segments for keys and values, or a linear state given by name."""
        if states:
            CompactedLayer.lazy_initialization(self, *states)
        else:
            LinearLayer.lazy_initialization(self, **linear)

    def reset(self) -> None:
        """Forget every token."""
        LinearLayer.reset(self)
        CompactedLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the cache has checked that it can be done."""
        LinearLayer.crop(self, tokens_to_remove)
        CompactedLayer.crop(self, tokens_to_remove)
