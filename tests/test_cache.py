"""The packed cache against a plain list of dense tokens."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache

from apack_compile import layer as layer_module
from apack_compile.basis import fit, moments
from apack_compile.cache import CompactedCache, LayerKind
from apack_compile.codec import Bands
from apack_compile.importance import NEWEST, CoarseRule, scores_of
from apack_compile.kernels.layout import to_groups
from apack_compile.kernels.turns import turned
from apack_compile.layer import MAX_APPEND
from apack_compile.plan import LayerPlan, Plan, StreamPlan, attentionpack_plan, budget_plan, lossless_plan
from apack_compile.preset_options import AttentionPackOptions
from apack_compile.rotary import KeyTurn, deinterleaved_keys, turns_at

LAYERS, HEADS, HEAD_DIM, RANK = 2, 2, 10, 6
WIDTH = HEADS * HEAD_DIM


def states_of(tokens: Tensor, layer: int, stream: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, n, D]` states of latent tokens `[B, n, RANK]`; every layer and stream mixes them in its own way."""
    generator = torch.Generator().manual_seed(97 * layer + stream)
    mixing, mean = torch.randn(RANK, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    x = tokens @ mixing + mean
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).to(dtype)


def model_plan(tail_slots: int, groups: int = 1, turn: KeyTurn | None = None, coarse: str | None = None) -> Plan:
    """Model-scoped bases that keep every direction the tokens have, in 8 bits."""

    def seen(layer: int, stream: int) -> Tensor:
        states = states_of(sample, layer, stream, torch.float32)
        if stream or turn is None:
            return states
        return turned(deinterleaved_keys(states, turn), turns_at(torch.arange(400), turn.frequencies))

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
    return Plan(dict.fromkeys(range(LAYERS), streams), tail_slots, groups=groups, bases=bases, turn=turn, coarse=rule)


def several_coordinates() -> KeyTurn:
    """Pairs that turn by one of three coordinates each."""
    return KeyTurn(torch.tensor([1.0, 0.3, 0.05]), block=4, coordinates=torch.tensor([2, 0, 1]))


RANKS = {f"{modality}_{stream}": RANK for modality in ("vision", "text") for stream in ("key", "value")}
PLANS: dict[str, Callable[[], Plan]] = {
    "lossless": lambda: lossless_plan(range(LAYERS)),
    "no tail": lambda: model_plan(0),
    "tail": lambda: model_plan(8, groups=2),
    "relative": lambda: model_plan(3, turn=KeyTurn(torch.tensor([1.0, 0.3, 0.05]), block=4)),
    "interleaved": lambda: model_plan(3, turn=KeyTurn(torch.tensor([1.0, 0.3, 0.05]), 4, interleaved=True)),
    "several coordinates": lambda: model_plan(3, turn=several_coordinates()),
    "coarse several": lambda: model_plan(0, turn=several_coordinates(), coarse="vision"),
    "coarse text": lambda: model_plan(0, turn=KeyTurn(torch.tensor([1.0, 0.3, 0.05]), block=4), coarse="text"),
    "coarse vision": lambda: model_plan(5, groups=2, coarse="vision"),
    "batch": lambda: attentionpack_plan(
        range(LAYERS), RANKS, MAX_APPEND, AttentionPackOptions(1.0, 1.0, basis="batch")
    ),
    "sequence": lambda: attentionpack_plan(range(LAYERS), RANKS, tail_slots=MAX_APPEND),
}


def new_cache(plan: Plan, expected_tokens: int = 8) -> CompactedCache:
    kinds = [LayerKind(layer, "full_attention", None) for layer in range(LAYERS)]
    return CompactedCache(kinds, DynamicCache(), lambda tokens, share: plan, expected_tokens)


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


def unpacked(cache: CompactedCache) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer, nothing of them exact by being new."""
    found = []
    for layer in cache.packed_layers:
        none = torch.empty(layer.batch_size, layer.num_heads, 0, HEAD_DIM, dtype=layer.dtype)
        found.append(
            torch.ops.apack.unpack(none, none, *layer.state(), int(layer.get_seq_length()), **layer.turn_state())
        )
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


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(PLANS)), st.sampled_from((torch.float32, torch.bfloat16)))
def test_any_sequence_of_operations_keeps_every_token(data, plan, dtype):
    pair = Pair(plan, batch=data.draw(st.integers(1, 3)), dtype=dtype, seed=data.draw(st.integers(0, 10**6)))
    for _ in range(data.draw(st.integers(1, 7))):
        names = ("chunk", "append", "crop", "reorder", "repeat", "select", "reset")
        step = data.draw(st.sampled_from(names)) if pair.held else "chunk"
        if step == "chunk":
            count = data.draw(st.integers(1 if pair.held else 4, 70))
            pair.feed(count, *data.draw(flags(pair, count)))
        elif step == "append":
            for _ in range(data.draw(st.integers(1, 20))):
                pair.feed(1)
        elif step == "crop":
            loose = pair.held - pair.cache.index.floor
            pair.cache.crop(-loose if (count := data.draw(st.integers(0, 30))) > loose else -count)
            left = pair.held - min(count, loose)
            pair.change(lambda x, n=left: x[:, :, :n], lambda x, n=left: x[:, :n])
        elif step == "reset":
            pair.cache.reset()
            pair.forget()
            assert int(pair.cache.get_seq_length()) == 0
            continue
        else:
            rows = torch.randint(0, pair.batch, (pair.batch,), generator=pair.generator)
            if step == "reorder":
                pair.cache.reorder_cache(rows)
            elif step == "select":
                rows = rows[: data.draw(st.integers(1, pair.batch))]
                pair.cache.batch_select_indices(rows)
            else:
                repeats = data.draw(st.integers(1, 2 if pair.batch < 4 else 1))
                pair.cache.batch_repeat_interleave(repeats)
                rows = torch.arange(pair.batch).repeat_interleave(repeats)
            pair.change(lambda x, rows=rows: x[rows], lambda x, rows=rows: x[rows])
        pair.check()


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_generation_far_past_the_expected_tokens_loses_none(plan):
    pair = Pair(plan, dtype=torch.float32)
    pair.feed(21)
    for _ in range(300):
        pair.feed(1)
    pair.check()
    assert pair.held == 321


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_chunks_around_the_append_limit_fit_their_masks(plan):
    pair = Pair(plan)
    vision = torch.zeros(2, 20, dtype=torch.bool)
    vision[:, 5:15] = True
    pair.feed(210)
    assert pair.cache.index.capacity == 256
    pair.feed(20, vision)
    pair.feed(MAX_APPEND)
    pair.feed(MAX_APPEND + 1)
    for _ in range(5):
        pair.feed(20, vision)
    pair.check()


@pytest.mark.parametrize("plan", [name for name in sorted(PLANS) if name != "lossless"])
def test_first_tokens_that_come_late_are_still_kept_dense(plan):
    pair = Pair(plan)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[0, :39] = padding[1, :20] = True
    pair.feed(40, None, padding)
    pair.feed(50)
    pair.check()


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_values_at_padded_positions_change_nothing(plan):
    pair = Pair(plan, batch=3)
    padding = torch.arange(60) < torch.tensor([[0], [7], [33]])
    vision = (torch.rand(3, 60, generator=pair.generator) < 0.5) & ~padding
    tokens = torch.randn(3, 60, RANK, generator=pair.generator)
    caches = []
    for garbage in (0.0, 1e3):
        cache = new_cache(PLANS[plan]())
        cache.expect(vision, padding)
        for layer in range(LAYERS):
            states = [states_of(tokens, layer, stream, torch.float32) for stream in range(2)]
            cache.update(*(x.masked_fill(padding[:, None, :, None], garbage) for x in states), layer)
        caches.append(cache)
    assert same_tokens(*caches)
    for one, other in zip(*(cache.packed_layers for cache in caches), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.bases, other.bases, strict=True))
    for keys, values in unpacked(caches[0]):
        assert not keys[2, :, :33].any() and not values[1, :, :7].any()


@pytest.mark.parametrize("plan", ("no tail", "sequence", "lossless"))
def test_vision_and_text_lie_in_segments_of_their_own(plan):
    pair = Pair(plan, batch=2)
    vision = torch.zeros(2, 90, dtype=torch.bool)
    vision[0, 10:50], vision[1, 30:45], vision[1, 60:80] = True, True, True
    padding = torch.zeros(2, 90, dtype=torch.bool)
    padding[1, :9] = True
    pair.feed(90, vision, padding)
    first, seen, text = pair.cache.index.positions
    assert first.tolist() == [[0, 1, 2, 3], [9, 10, 11, 12]]
    for row in range(2):
        assert seen[row][seen[row] >= 0].tolist() == vision[row].nonzero().flatten().tolist()
        rest = ~vision[row] & ~padding[row]
        rest[first[row].long()] = False
        assert text[row][(text[row] >= 0) & (text[row] < 90)].tolist() == rest.nonzero().flatten().tolist()
    assert (seen[1] == -1).sum() == 40 - 35
    assert pair.cache.packed_layers[0].codes[0].shape[2] == 40


@pytest.mark.parametrize("plan", ("coarse text", "coarse vision", "coarse several"))
def test_the_tokens_of_least_predicted_importance_are_coarse_by_layer(plan):
    pair = Pair(plan, batch=2)
    vision, padding = torch.zeros(2, 160, dtype=torch.bool), torch.zeros(2, 160, dtype=torch.bool)
    vision[0, 10:50], vision[1, 30:45], vision[1, 60:80] = True, True, True
    padding[1, :9] = True
    pair.feed(160, vision, padding)
    held, rule = pair.cache.index.plan, pair.cache.index.plan.coarse
    counted = (torch.arange(160) - torch.tensor([[0], [9]]))[..., None]
    places = pair.shown.permute(1, 2, 0) if held.has_coordinates else counted
    seen = []
    for i, layer in enumerate(pair.cache.packed_layers):
        first, coarse, *others = layer.own_positions
        scores = scores_of(*pair.dense[i], places, held.turn, rule.weights[i])
        for row in range(2):
            packed_first = {p for p in first[row].tolist() if p >= 0}
            of_modality = vision[row] if rule.modality == "vision" else ~vision[row] & ~padding[row]
            candidates = [p for p in of_modality.nonzero().flatten().tolist() if p not in packed_first]
            candidates = [p for p in candidates if p < 160 - NEWEST]
            ranked = sorted(candidates, key=lambda p: float(scores[row, p]))
            expected = sorted(ranked[: int(0.6 * len(ranked))])
            assert coarse[row][coarse[row] >= 0].tolist() == expected
            kept = [p for positions in others for p in positions[row].tolist() if 0 <= p < 160 - held.tail_slots]
            real = {p for p in range(160 - held.tail_slots) if not padding[row, p]}
            assert sorted([*kept, *expected, *packed_first]) == sorted(real), "every token has one place"
        seen.append(coarse)
    assert not torch.equal(*seen), "each layer ranks by itself"


def test_a_plan_from_statistics_holds_its_tokens(statistics_of):
    plan = budget_plan(statistics_of(LAYERS, HEADS, HEAD_DIM), 4.0, 2000, 0.5)
    cache = new_cache(plan)
    generator = torch.Generator().manual_seed(0)
    cache.expect(torch.rand(2, 300, generator=generator) < 0.5, None)
    states = [[torch.randn(2, HEADS, 300, HEAD_DIM, generator=generator) for _ in range(2)] for _ in range(LAYERS)]
    for layer, (key, value) in enumerate(states):
        out = cache.update(key, value, layer)
        assert torch.equal(out[0], key) and torch.equal(out[1], value)
    for found, expected in zip(unpacked(cache), states, strict=True):
        for got, x in zip(found, expected, strict=True):
            assert torch.equal(got[:, :, :4], x[:, :, :4].half().float())
            assert torch.isfinite(got).all()
    report = cache.report()
    assert report["sequence_bytes"] + report["model_bytes"] == walked_bytes(cache)
    assert report["model_bytes"] > 0 and report["ratio"] == report["dense_bytes"] / report["sequence_bytes"]


def test_rows_that_share_a_basis_hold_it_once():
    own, shared = Pair("sequence", batch=3), Pair("batch", batch=3)
    for pair in (own, shared):
        pair.feed(120)
        pair.check()
    mean, decoder, step = 2 * WIDTH, 2 * RANK * WIDTH, 4 * RANK
    empty_vision = mean
    saved = 2 * LAYERS * 2 * (mean + decoder + step + empty_vision)
    assert own.cache.report()["sequence_bytes"] - shared.cache.report()["sequence_bytes"] == saved
    assert all(len(b) == 1 for layer in shared.cache.packed_layers for b in layer.bases[6:])


def test_a_full_tail_of_a_sequence_basis_is_packed_anew():
    pair = Pair("sequence")
    pair.feed(50)
    layer = pair.cache.packed_layers[0]
    packed, old_basis = layer.codes[4].shape[2], layer.bases[7]
    for _ in range(MAX_APPEND + 1):
        pair.feed(1)
    assert layer.codes[4].shape[2] == packed + MAX_APPEND
    assert not torch.equal(layer.bases[7], old_basis)
    assert layer.cursor.tolist()[:2] == [50 + MAX_APPEND + 1, 50 + MAX_APPEND]
    pair.check()


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_crop_gives_back_the_newest_tokens_only(plan):
    pair = Pair(plan)
    pair.feed(40)
    before = copy.deepcopy(pair.cache)
    for _ in range(3):
        pair.feed(1)
    loose = pair.held - pair.cache.index.floor
    with pytest.raises(ValueError, match=f"cannot remove {loose + 1} of 43"):
        pair.cache.crop(-loose - 1)
    with pytest.raises(ValueError, match="negative"):
        pair.cache.crop(2)
    assert int(pair.cache.get_seq_length()) == 43
    pair.cache.crop(-3)
    assert int(pair.cache.get_seq_length()) == 40
    if plan not in ("tail", "relative", "interleaved", "several coordinates", "coarse vision"):
        assert same_tokens(pair.cache, before)


@pytest.mark.parametrize("bad", (float("nan"), float("-inf")), ids=str)
@pytest.mark.parametrize("where", ((0, 0), (0, 1), (LAYERS - 1, 0), (LAYERS - 1, 1)), ids=str)
@pytest.mark.parametrize("count", (1, 7, 12, MAX_APPEND + 8))
@pytest.mark.parametrize("held", (0, 37))
@pytest.mark.parametrize("plan", sorted(PLANS))
def test_states_that_are_not_finite_leave_the_cache_as_it_was(plan, held, count, where, bad):
    pair = Pair(plan)
    if held:
        pair.feed(held)
        for _ in range(7):
            pair.feed(1)
        kept = copy.deepcopy(pair.cache)
    bad_layer, bad_stream = where
    tokens = torch.randn(2, count, RANK, generator=pair.generator)

    def store(cache: CompactedCache, spoil: bool) -> None:
        for layer in range(LAYERS):
            chunk = [states_of(tokens, layer, stream, torch.float32) for stream in range(2)]
            if spoil and layer == bad_layer:
                chunk[bad_stream][1, 0, count // 2, 3] = bad
            cache.update(*chunk, layer)

    report = pair.cache.report()
    with pytest.raises(ValueError, match=f"layer {bad_layer}: {('key', 'value')[bad_stream]}"):
        store(pair.cache, spoil=True)
    if held:
        assert same_tokens(pair.cache, kept)
        for one, other in zip(pair.cache.packed_layers, kept.packed_layers, strict=True):
            assert torch.equal(one.cursor, other.cursor)
        assert pair.cache.report()["tokens"] == report["tokens"]
    else:
        assert not pair.cache.is_filled and int(pair.cache.get_seq_length()) == 0
        assert pair.cache.report() == report
        kept = new_cache(PLANS[plan]())
    store(pair.cache, spoil=False)
    store(kept, spoil=False)
    assert same_tokens(pair.cache, kept), "and it goes on as if nothing had happened"


@pytest.mark.parametrize("plan", ("lossless", "tail"))
@pytest.mark.parametrize(
    ("states", "message"),
    (
        (torch.zeros(3, HEADS, 1, HEAD_DIM), "batch size is 3, but this cache holds 2"),
        (torch.zeros(2, HEADS + 1, 1, HEAD_DIM), "number of KV heads is 3"),
        (torch.zeros(2, HEADS, 1, HEAD_DIM + 2), "head_dim is 12"),
        (torch.zeros(2, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16), "dtype is torch.bfloat16"),
    ),
    ids=("batch", "heads", "head_dim", "dtype"),
)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_states_of_another_shape_or_dtype_are_refused(plan, states, message, layer):
    pair = Pair(plan)
    pair.feed(30)
    kept = copy.deepcopy(pair.cache)
    good = torch.zeros(2, HEADS, 1, HEAD_DIM)
    with pytest.raises(ValueError, match=message):
        for i in range(layer + 1):
            chosen = states if i == layer else good
            pair.cache.update(chosen, chosen, i)
    assert same_tokens(pair.cache, kept)
    pair.feed(1)
    pair.check()


def test_large_states_are_refused_where_half_precision_cannot_hold_them():
    large = torch.full((1, HEADS, 5, HEAD_DIM), 1e5)
    cache = new_cache(PLANS["tail"]())
    with pytest.raises(ValueError, match="past float16"):
        cache.update(large, large, 0)
    with pytest.raises(ValueError, match="past float16"):
        cache.update(large.double(), large.double(), 0)
    lossless = new_cache(PLANS["lossless"]())
    for layer in range(LAYERS):
        assert torch.equal(lossless.update(large, large, layer)[0], large)


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_deep_copy_is_independent(plan):
    pair = Pair(plan)
    pair.feed(45)
    pair.feed(1)
    twin = copy.deepcopy(pair.cache)
    frozen = copy.deepcopy(pair.cache)
    for _ in range(20):
        pair.feed(1)
    pair.cache.reorder_cache(torch.tensor([1, 1]))
    assert same_tokens(twin, frozen)
    assert twin.report()["sequence_bytes"] == frozen.report()["sequence_bytes"]
    own, other = ({t.data_ptr() for t in reachable(cache, set()) if t.numel()} for cache in (pair.cache, twin))
    assert not own & other


def test_a_reset_cache_holds_the_next_prompt_like_a_new_one():
    pair, fresh = Pair("tail", seed=1), Pair("tail", seed=2)
    pair.feed(80)
    pair.cache.reset()
    pair.forget()
    pair.generator.manual_seed(2)
    pair.feed(50)
    fresh.feed(50)
    assert same_tokens(pair.cache, fresh.cache)
    assert pair.cache.report() == fresh.cache.report()


@pytest.mark.parametrize("change", ("reorder", "select", "repeat"))
@pytest.mark.parametrize("plan", ("relative", "several coordinates"))
def test_rows_with_other_padding_keep_their_turns(plan, change):
    pair = Pair(plan, batch=3)
    padding = torch.arange(30) < torch.tensor([[0], [7], [19]])
    vision = torch.rand(3, 30, generator=pair.generator) < torch.tensor([[0.2], [0.5], [0.8]])
    pair.feed(30, vision=vision & ~padding, padding=padding)
    rows = {"reorder": [2, 0, 0], "select": [2, 1], "repeat": [0, 0, 1, 1, 2, 2]}[change]
    if change == "reorder":
        pair.cache.reorder_cache(torch.tensor(rows))
    elif change == "select":
        pair.cache.batch_select_indices(torch.tensor(rows))
    else:
        pair.cache.batch_repeat_interleave(2)
    pair.change(lambda x: x[rows], lambda x: x[rows])
    pair.check()
    for _ in range(60):
        pair.feed(1)
    pair.check()


@pytest.mark.parametrize("scope", ("sequence", "batch"))
def test_a_basis_fitted_anew_starts_from_the_earlier_one(scope, monkeypatch):
    starts, fitted = [], layer_module.fit
    monkeypatch.setattr(
        layer_module, "fit", lambda stats, rank, start: starts.append(start) or fitted(stats, rank, start)
    )
    options = AttentionPackOptions(1.0, 1.0, basis=scope)
    cache = new_cache(attentionpack_plan(range(LAYERS), RANKS, MAX_APPEND, options))
    tokens = torch.randn(2, 90, RANK, generator=torch.Generator().manual_seed(3))
    for part in (tokens[:, :50], tokens[:, 50:]):
        cache.expect(None, None)
        starts.clear()
        for layer in range(LAYERS):
            cache.update(*(states_of(part, layer, stream, torch.float32) for stream in range(2)), layer)
        text = [start for start in starts if start is not None]
        assert len(text) == (0 if part.shape[1] == 50 else 2 * LAYERS)
    assert not any(layer.earlier_bases for layer in cache.layers)
    assert all(start.shape[-2:] == (RANK, WIDTH) for start in text)
