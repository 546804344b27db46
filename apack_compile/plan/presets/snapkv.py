"""Preset "snapkv" (arXiv 2404.14469): a prompt keeps the tokens that its newest ones attend to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from apack_compile.plan.plan import Plan
from apack_compile.plan.presets.base import Layers, Preset, check_count, check_share, half_plan
from apack_compile.plan.tiers import Prompt, Tokens, share_of


@dataclass(frozen=True)
class SnapKVOptions(Preset):
    """Options of preset "snapkv"; window and kernel are those of the paper's LongBench runs (arXiv 2404.14469).

    kept: share of a row's tokens, vision and text together, that are kept after a prompt. window: newest tokens of the prompt, which
    are always kept, and whose attention scores the others. kernel: neighbours, an odd number with the token itself, whose largest
    attention is its score (max pooling). The paper keeps other tokens for each KV head and gives their number; a layer here keeps the
    same ones for all heads, by their mean attention. Raises ValueError naming the argument.
    """

    name: ClassVar[str] = "snapkv"
    kept: float = 0.5
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        check_share(self.name, "kept", self.kept)
        for name in ("window", "kernel"):
            check_count(self.name, name, getattr(self, name))
        if self.kept == 0 or self.kernel % 2 == 0:
            raise ValueError(f"snapkv: kept={self.kept!r} must be > 0 and kernel={self.kernel!r} odd")

    @property
    def queries(self) -> int:
        """The window's tokens score the others."""
        return self.window

    @property
    def pools(self) -> tuple[tuple[str, ...], ...]:
        """All tokens compete."""
        return (("vision", "text"),)

    @property
    def reads_all(self) -> bool:
        """What is kept is read at every step."""
        return True

    def read_share(self, modality: str) -> float:
        """Share of a modality's tokens that a step reads."""
        return self.kept

    def importance(self, prompt: Prompt) -> Tensor:
        """The sum of the window's attention to each token before it, the largest of its neighbours'."""
        column = torch.arange(prompt.attention.shape[2], device=prompt.attention.device)
        before = prompt.attention.sum(1).masked_fill(column >= prompt.oldest[:, None], 0.0)
        return max_pool1d(before[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

    def always(self, tokens: Tokens) -> Tensor:
        """The window's tokens."""
        return tokens.place >= (tokens.count - self.window)[:, None]

    def budget(self, tokens: Tokens) -> Tensor:
        """The share that is kept, the window at least."""
        return share_of(tokens.seen, self.kept).clamp_min(self.window)

    def plan(self, wanted: Layers) -> Plan:
        """16-bit tokens, of which some are evicted."""
        return half_plan(wanted.layers, self)
