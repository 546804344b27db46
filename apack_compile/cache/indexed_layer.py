"""A packed layer whose model chooses, by an indexer, which tokens each query attends to, as in Qwen4."""

import torch
from torch import Tensor

from apack_compile.cache.kept_layers import RowChange
from apack_compile.cache.layer import CompactedLayer
from apack_compile.cache.shared_index import SharedIndex


class IndexedLayer(CompactedLayer):
    """Keys and values are packed; the indexer's keys `[B, T, D_index]` and positions `[dims, B, T]` are kept as transformers has them."""

    indexer_keys: Tensor | None
    indexer_position_ids: Tensor | None

    def __init__(self, layer_idx: int, index: SharedIndex) -> None:
        super().__init__(layer_idx, index)
        self._forget_indexer()

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add the indexer's keys of new tokens; all of them."""
        known = [] if self.indexer_keys is None else [self.indexer_keys]
        self.indexer_keys = torch.cat([*known, indexer_key_states], dim=1)
        return self.indexer_keys

    def map_rows(self, change: RowChange) -> None:
        """Apply a change of the batch to what the indexer keeps."""
        if self.indexer_keys is not None:
            self.indexer_keys = change(self.indexer_keys)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = change(self.indexer_position_ids.transpose(0, 1).contiguous()).transpose(0, 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the cache has checked that it can be done."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, :tokens_to_remove]
        if tokens_to_remove and self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :tokens_to_remove]

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self._forget_indexer()

    def _forget_indexer(self) -> None:
        self.indexer_keys = None
        self.indexer_position_ids = None
