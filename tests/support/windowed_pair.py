"""A packed cache of layers with windows, beside the dense tokens that queries see."""

from dataclasses import dataclass, field, replace

import torch
from packed_pair import (
    HEAD_DIM,
    HEADS,
    RANK,
    RANKS,
    gives_what_it_holds,
    model_plan,
    rotates_by_its_positions,
    states_of,
)
from torch import Tensor
from transformers.cache_utils import DynamicCache

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.plan.plan import Plan
from apack_compile.plan.presets.attentionpack import attentionpack_plan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.source import PlanSource

ROTATION = torch.tensor([1.0, 0.3, 0.05])
# Of each layer, by which tokens it sees.
WINDOWS: dict[str, tuple[int | None, ...]] = {
    "sliding": (12, 12),
    "one full": (12, None),
    "long": (45, None),
    "two windows": (9, 30),
}


def plan_of(name: str, layers: list[int]) -> Plan:
    """A plan of some layers."""
    if name == "lossless":
        return lossless_plan(layers)
    if name == "sequence":
        return attentionpack_plan(layers, RANKS, tail_slots=32)
    tail, rotation = {
        "no tail": (0, None),
        "tail": (5, None),
        "relative": (0, KeyRotation(ROTATION, block=4)),
        "relative tail": (3, KeyRotation(ROTATION, block=4)),
        "interleaved": (3, KeyRotation(ROTATION, block=8, interleaved=True)),
    }[name]
    plan = model_plan(tail, rotation=rotation)
    return Plan(
        {layer: plan.layers[layer] for layer in layers},
        tail,
        bases={i: plan.bases[i] for i in layers},
        rotation=rotation,
    )


PLANS = ("lossless", "no tail", "tail", "relative", "relative tail", "interleaved", "sequence")


@dataclass
class WindowedPair:
    """A packed cache with windows and the dense tokens of each layer."""

    plan: str
    windows: tuple[int | None, ...]
    batch: int = 2
    seed: int = 0
    cache: CompactedCache = field(init=False)
    dense: list[list[Tensor]] = field(init=False)
    padding: Tensor = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        kinds = [LayerKind(i, "attention", None, window=window) for i, window in enumerate(self.windows)]
        layers = {window: [i for i, w in enumerate(self.windows) if w == window] for window in self.windows}
        first, *others = (replace(plan_of(self.plan, of), window=window) for window, of in layers.items())
        plan = replace(first, windows={part.window: part for part in others})
        self.cache = CompactedCache(kinds, DynamicCache(), PlanSource(given=plan), 8)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.forget()

    def forget(self) -> None:
        self.dense = [[torch.empty(self.batch, HEADS, 0, HEAD_DIM)] * 2 for _ in self.windows]
        self.padding = torch.empty(self.batch, 0, dtype=torch.bool)

    @property
    def held(self) -> int:
        return self.padding.shape[1]

    def change(self, how, tokens) -> None:
        """Change the dense tokens, and the flags, of every layer."""
        self.dense = [[how(x) for x in layer] for layer in self.dense]
        self.padding = tokens(self.padding)
        self.batch = len(self.padding)

    def feed(self, count: int, vision: Tensor | None = None, padding: Tensor | None = None) -> None:
        """Store a chunk in both; check that the cache returns all that the chunk's queries see."""
        new = torch.randn(self.batch, count, RANK, generator=self.generator)
        none = torch.zeros(self.batch, count, dtype=torch.bool)
        before = self.held
        self.padding = torch.cat([self.padding, none if padding is None else padding], 1)
        self.cache.expect(vision, padding)
        for layer, window in enumerate(self.windows):
            chunk = [states_of(new, layer, stream, torch.float32) for stream in range(2)]
            length, offset = self.cache.get_mask_sizes(count, layer)
            out = self.cache.update(*chunk, layer)
            self.dense[layer] = [torch.cat(pair, 2) for pair in zip(self.dense[layer], chunk, strict=True)]
            seen_from = 0 if window is None else max(before - window + 1, 0)
            assert offset <= seen_from
            for got, expected in zip(out, self.dense[layer], strict=True):
                assert got.shape[2] == length, "as long as the mask"
                own = slice(before - offset, self.held - offset)
                assert torch.equal(got[:, :, own], expected[:, :, before:]), "the chunk's own tokens are exact"
                self.compare(got[:, :, seen_from - offset : self.held - offset], expected[:, :, seen_from:], seen_from)
        assert int(self.cache.get_seq_length()) == self.held

    def compare(self, got: Tensor, expected: Tensor, start: int) -> None:
        """Real tokens from position `start` on, as the plan promises."""
        real = ~self.padding[:, start:]
        got, expected = got.transpose(1, 2)[real], expected.transpose(1, 2)[real]
        if self.plan == "lossless":
            assert torch.equal(got, expected)
            return
        error = (got - expected).flatten(1).norm(dim=1)
        assert (error <= 0.05 * expected.flatten(1).norm(dim=1)).all(), "a token is lost or in the wrong place"

    def check(self) -> None:
        """Every token that a query from the first position that can be cropped on sees, as `unpack` gives it."""
        floor = self.cache.groups.floor
        assert self.held - self.cache.croppable == floor <= self.held
        assert all(map(gives_what_it_holds, self.cache.packed_layers))
        assert all(map(rotates_by_its_positions, self.cache.packed_layers))
        for layer, window in zip(self.cache.packed_layers, self.windows, strict=True):
            none = torch.empty(layer.batch_size, HEADS, 0, HEAD_DIM)
            found = torch.ops.apack.unpack(none, none, *layer.state().flatten(), self.held)
            seen_from = 0 if window is None else max(floor - window + 1, 0)
            for got, expected in zip(found, self.dense[layer.layer_idx], strict=True):
                self.compare(got[:, :, seen_from:], expected[:, :, seen_from:], seen_from)
