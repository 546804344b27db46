"""A packed cache beside the dense tokens that it should hold."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache

from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.layer import MAX_APPEND, CompactedLayer
from apack_compile.cache.layer_kinds import LayerKind
from apack_compile.kernels.format import Bands
from apack_compile.kernels.heads import to_groups
from apack_compile.kernels.rotations import rotated
from apack_compile.plan.basis import fit, moments
from apack_compile.plan.coarse_rule import CoarseRule
from apack_compile.plan.plan import LayerPlan, Plan, StreamPlan
from apack_compile.plan.presets.attentionpack import AttentionPackOptions, attentionpack_plan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.rotation import KeyRotation, deinterleaved_keys, rotations_at, rotations_of_blocks
from apack_compile.plan.source import PlanSource

LAYERS, HEADS, HEAD_DIM, RANK = 2, 2, 10, 6
WIDTH = HEADS * HEAD_DIM


def states_of(tokens: Tensor, layer: int, stream: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, n, D]` states of latent tokens `[B, n, RANK]`; every layer and stream mixes them in its own way."""
    generator = torch.Generator().manual_seed(97 * layer + stream)
    mixing, mean = torch.randn(RANK, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    x = tokens @ mixing + mean
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).to(dtype)


def model_plan(
    tail_slots: int, groups: int = 1, rotation: KeyRotation | None = None, coarse: str | None = None
) -> Plan:
    """Model-scoped bases that keep every direction the tokens have, in 8 bits."""

    def seen(layer: int, stream: int) -> Tensor:
        states = states_of(sample, layer, stream, torch.float32)
        if stream or rotation is None:
            return states
        return rotated(deinterleaved_keys(states, rotation), rotations_at(torch.arange(400), rotation.frequencies))

    width = WIDTH // groups
    bands = Bands((0, width, 0, 0))
    stream = StreamPlan("model", bands, token_scale=True)
    sample = torch.randn(1, 400, RANK, generator=torch.Generator().manual_seed(5))
    bases = {}
    for layer in range(LAYERS):
        spectra = [fit(moments(to_groups(seen(layer, i % 2), groups))) for i in range(4 if coarse is None else 6)]
        bases[layer] = tuple(spectrum.basis(bands) for spectrum in spectra)
    streams = LayerPlan(*[stream] * (4 if coarse is None else 6))
    rule = None
    if coarse is not None:
        weights = torch.randn(LAYERS, 2 * (WIDTH + HEADS), generator=torch.Generator().manual_seed(6))
        rule = CoarseRule(coarse, 0.6, dict(enumerate(weights)))
    return Plan(
        dict.fromkeys(range(LAYERS), streams), tail_slots, groups=groups, bases=bases, rotation=rotation, coarse=rule
    )


def several_coordinates() -> KeyRotation:
    """Pairs that rotate by one of three coordinates each."""
    return KeyRotation(torch.tensor([1.0, 0.3, 0.05]), block=4, coordinates=torch.tensor([2, 0, 1]))


RANKS = {f"{modality}_{stream}": RANK for modality in ("vision", "text") for stream in ("key", "value")}
PLANS: dict[str, Callable[[], Plan]] = {
    "lossless": lambda: lossless_plan(range(LAYERS)),
    "no tail": lambda: model_plan(0),
    "tail": lambda: model_plan(8, groups=2),
    "relative": lambda: model_plan(3, rotation=KeyRotation(torch.tensor([1.0, 0.3, 0.05]), block=4)),
    "interleaved": lambda: model_plan(3, rotation=KeyRotation(torch.tensor([1.0, 0.3, 0.05]), 4, interleaved=True)),
    "several coordinates": lambda: model_plan(3, rotation=several_coordinates()),
    "coarse several": lambda: model_plan(0, rotation=several_coordinates(), coarse="vision"),
    "coarse text": lambda: model_plan(0, rotation=KeyRotation(torch.tensor([1.0, 0.3, 0.05]), block=4), coarse="text"),
    "coarse vision": lambda: model_plan(5, groups=2, coarse="vision"),
    "batch": lambda: attentionpack_plan(
        range(LAYERS), RANKS, MAX_APPEND, AttentionPackOptions(1.0, 1.0, basis="batch")
    ),
    "sequence": lambda: attentionpack_plan(range(LAYERS), RANKS, tail_slots=MAX_APPEND),
}


def new_cache(plan: Plan, expected_tokens: int = 8) -> CompactedCache:
    kinds = [LayerKind(layer, "full_attention", None) for layer in range(LAYERS)]
    return CompactedCache(kinds, DynamicCache(), PlanSource(given=plan), expected_tokens)


@dataclass
class Pair:
    """A packed cache and the dense tokens it should hold."""

    plan: str
    batch: int = 2
    dtype: torch.dtype = torch.float32
    seed: int = 0
    cache: CompactedCache = field(init=False)
    dense: list[list[Tensor]] = field(init=False)
    vision: Tensor = field(init=False)
    padding: Tensor = field(init=False)
    shown: Tensor = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.cache = new_cache(PLANS[self.plan]())
        self.generator = torch.Generator().manual_seed(self.seed)
        self.forget()

    def forget(self) -> None:
        self.dense = [[torch.empty(self.batch, HEADS, 0, HEAD_DIM, dtype=self.dtype)] * 2 for _ in range(LAYERS)]
        self.vision = self.padding = torch.empty(self.batch, 0, dtype=torch.bool)

    @property
    def held(self) -> int:
        return self.padding.shape[1]

    def change(self, how: Callable[[Tensor], Tensor], tokens: Callable[[Tensor], Tensor]) -> None:
        """Change the dense tokens, and the flags, of every layer."""
        self.dense = [[how(x) for x in layer] for layer in self.dense]
        self.vision, self.padding = tokens(self.vision), tokens(self.padding)
        self.batch = len(self.padding)

    def feed(self, count: int, vision: Tensor | None = None, padding: Tensor | None = None) -> None:
        """Store a chunk in both; check what the cache returns."""
        none = torch.zeros(self.batch, count, dtype=torch.bool)
        new = torch.randn(self.batch, count, RANK, generator=self.generator)
        self.vision = torch.cat([self.vision, none if vision is None else vision], 1)
        self.padding = torch.cat([self.padding, none if padding is None else padding], 1)
        self.cache.expect(vision, padding)
        self.shown = torch.randint(0, 900, (3, self.batch, count), generator=self.generator)
        self.cache.show_positions(self.shown)
        length, offset = self.cache.get_mask_sizes(count, 0)
        assert offset == 0
        for layer in range(LAYERS):
            chunk = [states_of(new, layer, stream, self.dtype) for stream in range(2)]
            out = self.cache.update(*chunk, layer)
            self.dense[layer] = [torch.cat(pair, 2) for pair in zip(self.dense[layer], chunk, strict=True)]
            for got, own, expected in zip(out, chunk, self.dense[layer], strict=True):
                assert got.dtype == self.dtype
                assert got.shape[2] == length, "as long as the mask"
                assert torch.equal(got[:, :, self.held - count : self.held], own), "the chunk's own tokens are exact"
                assert not got[:, :, self.held :].any()
                self.compare(got[:, :, : self.held], expected)
        assert int(self.cache.get_seq_length()) == self.held

    def compare(self, got: Tensor, expected: Tensor) -> None:
        """Real tokens as the plan promises, the first four of each row in half precision."""
        real = ~self.padding
        first = real & (real.cumsum(1) <= 4)
        got, expected = got.transpose(1, 2), expected.transpose(1, 2)
        if self.plan == "lossless":
            assert torch.equal(got[real], expected[real])
            return
        half = torch.float16 if self.dtype == torch.float32 else self.dtype
        assert ((got == expected) | (got == expected.to(half).to(self.dtype)))[first].all()
        error = (got - expected)[real].float().flatten(1).norm(dim=1)
        assert (error <= 0.05 * expected[real].float().flatten(1).norm(dim=1)).all(), (
            "a token is lost or in the wrong place"
        )

    def check(self) -> None:
        """Everything held, as `unpack` gives it, and the report."""
        assert int(self.cache.get_seq_length()) == self.held
        for layer, found in enumerate(unpacked(self.cache)):
            for got, expected in zip(found, self.dense[layer], strict=True):
                self.compare(got, expected)
        report = self.cache.report()
        assert report["tokens"] == self.batch * self.held
        assert report["dense_bytes"] == self.batch * self.held * 2 * WIDTH * LAYERS * 2
        assert report["sequence_bytes"] + report["model_bytes"] == walked_bytes(self.cache)
        assert all(map(gives_what_it_holds, self.cache.packed_layers))
        assert all(map(rotates_by_its_positions, self.cache.packed_layers))


def gives_what_it_holds(layer: CompactedLayer) -> bool:
    """Whether what a layer keeps ready for a step is its very tensors."""
    (kept, kept_layout), (held, layout) = layer.flat, layer.state().flatten()
    return kept_layout == layout and len(kept) == len(held) and all(map(operator.is_, kept, held))


def rotates_by_its_positions(layer: CompactedLayer) -> bool:
    """Whether the rotations of a layer's blocks are those that its positions give when they are followed anew."""
    index, rotations = layer.index, layer.rotations()
    if index.plan.rotation is None:
        return not rotations
    anew = [rotations_of_blocks(places, index.coordinates, index.plan.rotation) for places in layer.positions()[1:]]
    return len(rotations) == len(anew) and all(map(torch.equal, rotations, anew))


def unpacked(cache: CompactedCache) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer, nothing of them exact by being new."""
    found = []
    for layer in cache.packed_layers:
        none = torch.empty(layer.batch_size, layer.num_heads, 0, HEAD_DIM, dtype=layer.dtype)
        found.append(torch.ops.apack.unpack(none, none, *layer.state().flatten(), int(layer.get_seq_length())))
    return found


def reachable(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Tensors reachable from an object through containers and objects of this package."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from reachable(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from reachable(item, seen)
    elif not callable(value) and type(value).__module__.startswith(("apack_compile", "transformers")):
        yield from reachable(vars(value), seen)


def walked_bytes(cache: CompactedCache) -> int:
    """Bytes of all distinct storages that a cache can reach."""
    storages = [tensor.untyped_storage() for tensor in reachable(cache, set())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def same_tokens(one: CompactedCache, other: CompactedCache) -> bool:
    """Whether two caches hold bitwise the same."""
    pairs = zip(unpacked(one), unpacked(other), strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


@st.composite
def flags(draw, pair: Pair, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Vision tokens anywhere, padding on the left of a first chunk that leaves every row four tokens."""
    vision = None
    if draw(st.booleans()):
        vision = torch.rand(pair.batch, count, generator=pair.generator) < draw(st.sampled_from((0.1, 0.9)))
    padding = None
    if ((pair.held == 0 and count > 4) or count > MAX_APPEND) and draw(st.booleans()):
        most = torch.randint(0, count - 3, (pair.batch, 1), generator=pair.generator)
        padding = torch.arange(count) < most
        vision = None if vision is None else vision & ~padding
    return vision, padding
