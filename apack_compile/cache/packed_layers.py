"""Which of transformers' cache layers have keys and values that are packed, and what stands in their place."""

from typing import Any

from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from apack_compile.cache.hybrid_layer import HybridLayer
from apack_compile.cache.indexed_layer import IndexedLayer
from apack_compile.cache.layer import CompactedLayer
from apack_compile.cache.shared_index import SharedIndex

PACKED_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def packed_layer(layer_idx: int, index: SharedIndex, own: Any) -> CompactedLayer:
    """The packed layer in the place of transformers' `own`."""
    if hasattr(own, "number_of_states"):
        return HybridLayer(layer_idx, index, own.number_of_states)
    return (IndexedLayer if hasattr(own, "indexer_keys") else CompactedLayer)(layer_idx, index)


def can_compile(own: Any) -> bool:
    """Whether a decode step over the packed layer in the place of transformers' `own` can be compiled."""
    return not isinstance(own, LinearAttentionAndSlidingWindowAttentionLayer)
