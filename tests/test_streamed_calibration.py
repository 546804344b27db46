"""Calibration in bounded memory: gradients one layer at a time, sums and samples that do not grow with the inputs."""

import gc
import io
import mmap
import platform
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_llama import llama
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.utils import logging

import apack_compile
from apack_compile.calibration import collect as collected
from apack_compile.calibration.collect import Observations, add_observation, as_packed, collect
from apack_compile.calibration.differentiated_layers import Differentiation, Repeated, unpack
from apack_compile.calibration.find_rotation import find_rotation
from apack_compile.calibration.host_memory import give_back
from apack_compile.calibration.inputs import limited
from apack_compile.calibration.sensitivity import LABEL_DRAWS, draw_gradients, drawn_score, observe
from apack_compile.calibration.streams import SAMPLE_TOKENS, Running, RunningMoments, TokenSample
from apack_compile.generate.session import session_of

TOKENS, QUERIES = 56, 7


def build(kv_heads: int = 2) -> LlamaForCausalLM:
    return llama(num_hidden_layers=2, num_key_value_heads=kv_heads).double()


def prompt(tokens: int = TOKENS, rows: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(3, 32, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", (6, 3, 1))
def test_streamed_gradients_are_those_of_leaves(kv_heads):
    model, ids = build(kv_heads), prompt(rows=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-QUERIES], past_key_values=cache)
    leaves = []
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.requires_grad_(), layer.values.requires_grad_()
        leaves += [layer.keys, layer.values]
    logits = model(ids[:, -QUERIES:], past_key_values=cache).logits
    expected: dict[tuple[int, int], Tensor] = {}
    for seed in range(LABEL_DRAWS):
        drawn = torch.autograd.grad(drawn_score(logits, None, seed), leaves, retain_graph=True)
        for i, gradient in enumerate(drawn):
            expected[divmod(i, 2)] = expected.get(divmod(i, 2), 0) + gradient.square()
    found: dict[tuple[int, int], Tensor] = {}
    seen = observe(model, {"input_ids": ids}, [0, 1])
    assert seen.queries == QUERIES
    for _ in range(2):
        found.clear()
        reason = draw_gradients(
            seen, lambda i, stream, g: found.update({(i, stream): found.get((i, stream), 0) + g.square()})
        )
        assert reason is None and set(found) == set(expected)
        for place, squares in expected.items():
            torch.testing.assert_close(found[place], squares)


def test_what_the_backward_pass_keeps_of_repeated_heads_are_the_heads():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 3, 5, 4, generator=generator)
    shared = Differentiation(torch.zeros(()), newest=(key, value))
    for states in (key, value):
        kept = shared.pack(states.repeat_interleave(4, dim=1))
        assert isinstance(kept, Repeated) and kept.states.data_ptr() == states.data_ptr()
        assert torch.equal(unpack(kept), states.repeat_interleave(4, dim=1))
    almost = value.repeat_interleave(2, dim=1)
    almost[1, 3, 4, 3] += 1
    for other in (almost, value.repeat(1, 2, 1, 1), value, value.repeat_interleave(2, dim=1).double(), value[0]):
        kept = shared.pack(other)
        assert not isinstance(kept, Repeated) and torch.equal(unpack(kept), other)
        assert kept.data_ptr() == other.data_ptr()


def test_an_observation_s_memory_goes_with_it():
    """Without the garbage collector, which knows nothing of the bytes: the graph keeps none of its own outputs."""
    model, alive = build(), []
    gc.collect()
    gc.disable()
    try:
        seen = observe(model, {"input_ids": prompt()}, [0, 1])
        draw_gradients(seen, lambda layer, stream, gradient: None)
        alive += [weakref.ref(seen.gradients.shared), weakref.ref(seen.gradients.logits)]
        alive += [weakref.ref(x.untyped_storage()) for both in seen.states.values() for x in both]
        del seen
        assert [one() for one in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_statistics_take_as_much_memory_for_several_inputs_as_for_one():
    model, running, held = build(), Running(), []
    for seed in range(3):
        batch = {"input_ids": prompt(SAMPLE_TOKENS + 300, seed=seed)}
        add_observation(running, as_packed(observe(model, batch, [0, 1]), None), model.config, batch, 1)
        held.append(sum(map(bytes_of, running.values())))
    assert held[0] == held[1] == held[2]
    assert {key[:2] for key in running} == {(0, "text"), (1, "text")}


def test_tokens_added_in_parts_are_those_of_all_at_once(monkeypatch):
    model, batch, found = build(), {"input_ids": prompt(rows=2)}, []
    rotation = find_rotation(model, [0, 1], batch, 16)[0]
    assert rotation is not None
    for columns in (TOKENS, 5):
        monkeypatch.setattr(collected, "COLUMNS_AT_ONCE", columns)
        running: Running = {}
        add_observation(running, as_packed(observe(model, batch, [0, 1]), rotation), model.config, batch, 1)
        found.append(running)
    for key, whole in found[0].items():
        parts = found[1][key]
        assert (parts.count, parts.gradients, parts.queries) == (whole.count, whole.gradients, whole.queries)
        torch.testing.assert_close(parts.finish().covariance, whole.finish().covariance, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parts.sensitivity, whole.sensitivity, atol=1e-7, rtol=1e-4)


def bytes_of(moments: RunningMoments) -> int:
    """Bytes of the tensors of a stream's sums."""
    named = [getattr(x, one.name) for x in (moments, moments.sample) for one in fields(x)]
    return sum(x.nbytes for x in named if isinstance(x, Tensor))


def test_a_sample_holds_every_token_while_it_can_and_then_any_of_them():
    sample, few = TokenSample(), torch.randn(2, SAMPLE_TOKENS - 5, 3)
    for part in few.split(700, dim=1):
        sample.add(part)
    assert torch.equal(sample.tokens, few.bfloat16())
    kept = torch.zeros(6)
    for block in range(6):
        sample.add(torch.full((2, 3_000, 3), float(block)))
    for block in range(6):
        kept[block] = (sample.tokens[0, :, 0] == block).sum()
    assert sample.tokens.shape == (2, SAMPLE_TOKENS, 3) and len(sample.drawn) == SAMPLE_TOKENS
    expected = SAMPLE_TOKENS * 3_000 / (6 * 3_000 + SAMPLE_TOKENS - 5)
    assert ((kept - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back by themselves, or have no call for it"
)
def test_freed_memory_between_pieces_in_use_goes_back_to_the_system():
    piece = 2**16
    pieces = [torch.ones(piece, dtype=torch.uint8) for _ in range(3_000)]
    del pieces[::2]
    held = resident()
    give_back()
    assert resident() < held - 1_000 * piece
    assert all(bool(x.all()) for x in pieces)


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class NoBackward(torch.autograd.Function):
    """States as they are, without a backward pass."""

    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("this layer has no backward")


def test_layers_before_one_without_a_backward_pass_count_like_those_behind_it():
    model = build()
    model.model.layers[0].register_forward_hook(lambda module, args, output: NoBackward.apply(output))
    collected = collect(Observations(model, [0, 1], {"input_ids": prompt()}))
    assert "this layer has no backward" in collected.without_gradients
    for layer in range(2):
        for stream in collected.statistics[layer]["text"]:
            assert float(stream.weights.sum()) == pytest.approx(1.0)
            variance = stream.spectrum.deviation[0].square()
            torch.testing.assert_close(stream.weights, variance / variance.sum())


def test_an_error_of_who_takes_the_gradients_is_not_the_model_s():
    def receive(layer, stream, gradient):
        raise RuntimeError("mine")

    seen = observe(build(), {"input_ids": prompt()}, [0, 1])
    with pytest.raises(RuntimeError, match="mine"):
        draw_gradients(seen, receive)
    assert draw_gradients(seen, lambda layer, stream, gradient: None) is None


def test_no_more_logits_are_made_than_are_needed():
    model, asked = build(), []
    forward = model.lm_head.register_forward_pre_hook(lambda module, args: asked.append(args[0].shape[1]))
    observe(model, {"input_ids": prompt()}, [0, 1])
    forward.remove()
    assert asked == [1, QUERIES]


def optimized() -> LlamaForCausalLM:
    return apack_compile.optimize(build().float(), ratio=3, compile="none", min_tokens=0)


@pytest.mark.parametrize("kind", (KeyboardInterrupt, ValueError))
def test_an_interrupted_calibration_leaves_the_one_before(kind):
    model = apack_compile.calibrate(optimized(), {"input_ids": prompt(200)})
    before, ids = session_of(model).source, prompt(100, seed=2)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    calls = []

    def stop(module, args):
        calls.append(module)
        if len(calls) == 5:
            raise kind

    hook = model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(kind):
        apack_compile.calibrate(model, [{"input_ids": prompt(150, seed=i)} for i in range(4)])
    hook.remove()
    assert session_of(model).source is before
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert session_of(model).outdated is None


def test_a_limit_of_tokens_cuts_text_and_leaves_out_what_comes_after():
    model = build()
    several = [{"input_ids": prompt(50, rows=2, seed=i), "logits_to_keep": 1} for i in range(3)]
    assert limited(model, several, None) == several
    assert [x["input_ids"].shape for x in limited(model, several, 100)] == [(2, 50)]
    assert [x["input_ids"].shape for x in limited(model, several, 101)] == [(2, 50), (2, 1)]
    first, second = limited(model, several, 150)
    assert first is several[0] and torch.equal(second["input_ids"], several[1]["input_ids"][:, :25])
    with_picture = {"input_ids": prompt(50), "pixel_values": torch.zeros(1, 3, 2, 2)}
    assert limited(model, [with_picture, *several], 20) == [with_picture]
    mask = torch.ones(1, 50, dtype=torch.int64)
    mask[:, :30] = 0
    places = torch.arange(50).expand(3, 1, 50)
    (cut,) = limited(model, [{"input_ids": prompt(50), "attention_mask": mask, "position_ids": places}], 8)
    assert torch.equal(cut["input_ids"], prompt(50)[:, 30:38]) and cut["attention_mask"].tolist() == [[1] * 8]
    assert torch.equal(cut["position_ids"], places[..., 30:38])


@pytest.mark.parametrize("tokens", (0, -3, 2.5, "many", True))
def test_a_limit_that_is_none_is_refused(tokens):
    with pytest.raises(ValueError, match=r"tokens=.* must be a whole number of at least 1, or None for no limit"):
        apack_compile.calibrate(optimized(), {"input_ids": prompt(100)}, tokens=tokens)


def test_a_bar_counts_every_layer_of_every_input():
    bars = []

    def hook(factory, args, kwargs):
        bars.append(factory(*args, **{**kwargs, "delay": 0, "disable": False, "file": io.StringIO()}))
        return bars[-1]

    before = logging.set_tqdm_hook(hook)
    try:
        apack_compile.calibrate(optimized(), [{"input_ids": prompt(300, seed=i)} for i in range(3)])
    finally:
        logging.set_tqdm_hook(before)
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [2 * 4 * 2]
