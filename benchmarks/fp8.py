"""A dense cache in float8_e4m3fn with one scale per token and head.

transformers' own fp8 cache has one scale per tensor and reads a chunk's own tokens back rounded in the step that brings them.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class Fp8Layer(DynamicLayer):
    """One layer: codes float8 `[B, H_kv, T, D]` and scales float16 `[B, H_kv, T, 1]` of key and value."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store `[B, H_kv, n, D]` tokens; K and V of every token held, the new ones exact."""
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.codes = [states.new_empty((*states.shape[:2], 0, states.shape[3]), dtype=FP8) for states in new]
            self.scales = [states.new_empty((*states.shape[:2], 0, 1), dtype=torch.float16) for states in new]
        out = []
        for stream, states in enumerate(new):
            held = self.codes[stream].float() * self.scales[stream].float()
            out.append(torch.cat([held.to(states.dtype), states], dim=2))
            # the smallest normal float16: a token of zeros has no scale of its own
            scale = (states.float().abs().amax(-1, keepdim=True) / LARGEST).clamp_min(2.0**-14).half()
            codes = (states.float() / scale.float()).clamp(-LARGEST, LARGEST).to(FP8)
            self.codes[stream] = torch.cat([self.codes[stream], codes], dim=2)
            self.scales[stream] = torch.cat([self.scales[stream], scale], dim=2)
        return out[0], out[1]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.codes[0].shape[2] if self.is_initialized else 0
