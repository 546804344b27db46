"""Static buffers that a compiled module owns are packed at the first decode call, and what is packed cannot go stale."""

import copy
import ctypes
import gc
import operator
import weakref
from dataclasses import replace

import pytest
import torch
from static_models import HEAD_DIM, KV_HEADS, UPDATES, StaticModel, run, tokens_of
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CompileConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)

import apack_compile
from apack_compile.backend.own_cache import span_of
from apack_compile.errors import StrictError
from apack_compile.plan.presets.base import half_plan
from apack_compile.plan.presets.lossless import lossless_plan

PROMPT, STEPS = 101, 64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def lossless(tmp_path_factory) -> str:
    """A plan that stores tokens as they are, so that packed must equal dense."""
    path = tmp_path_factory.mktemp("plans") / "plan"
    signature = (8, KV_HEADS, HEAD_DIM, "torch.float32")
    replace(lossless_plan([3, 7]), signature=signature).save(path)
    return str(path)


def compiled(model, **options):
    """The compiled model and its log."""
    log = apack_compile.GraphLog()
    options = {"own_cache": True, "inner": "eager", "strict": True, "log": log, **options}
    return torch.compile(model, backend="attentionpack", fullgraph=True, options=options), log


def held(log):
    (caches,) = log.caches
    return caches.report()


def close(out, expected):
    """Equal up to rounding: the packed form adds in another order."""
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def prefilled(model, log_and_step, prompt=PROMPT, batch=1, seed=1):
    """Both models after the same prompt, whose dense results are equal."""
    step, _ = log_and_step
    tokens = tokens_of(prompt, batch, seed)
    close(run(step, tokens, 0, prompt), run(model, tokens, 0, prompt))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("batch", [1, 3])
def test_64_decode_steps_over_tokens_kept_as_they_are_equal_the_dense_ones(update, batch, lossless):
    model = StaticModel(batch=batch, update=update)
    dense = copy.deepcopy(model)
    step, log = compiled(model, plan=lossless)
    prefilled(dense, (step, log), batch=batch)
    assert held(log) is None
    tokens = tokens_of(STEPS, batch, 2)
    close(run(step, tokens, PROMPT), run(dense, tokens, PROMPT))
    assert held(log)["tokens"] == batch * (PROMPT + STEPS)
    assert not any(buffer.any() for buffer in model.buffers_of_layers)
    # float32 tokens against a dense cache in 16 bits
    assert any(note.startswith("holds more than a 16-bit dense cache") for note in apack_compile.report(log).notes)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_ratio_4_is_held_and_costs_little(inner):
    model = StaticModel()
    dense = copy.deepcopy(model)
    step, log = compiled(model, ratio=4, inner=inner)
    prefilled(dense, (step, log))
    tokens = tokens_of(12, 1, 2)
    out, expected = run(step, tokens, PROMPT), run(dense, tokens, PROMPT)
    error = float((out - expected).norm() / expected.norm())
    assert 1e-6 < error < 0.05, "a lossy cache is neither exact nor far off"
    found = held(log)
    assert found["ratio"] > 3.9
    assert found["buffer_bytes"] == sum(buffer.nbytes for buffer in model.buffers_of_layers) == 2 * found["dense_bytes"]


def test_64_steps_and_another_sequence_compile_one_prefill_and_one_decode_graph(lossless):
    model = StaticModel()
    step, log = compiled(model)
    run(step, tokens_of(PROMPT), 0, PROMPT)
    run(step, tokens_of(2), PROMPT)
    compiled_before = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        run(step, tokens_of(STEPS), PROMPT + 2)
        run(model, tokens_of(77, 1, 5), 0, 77)
        run(step, tokens_of(STEPS), 77)
    assert counters["stats"]["unique_graphs"] == compiled_before == 4, "prefill and decode, each once more as a form"
    assert len(log.graphs) == 2


def test_the_buffers_memory_goes_back_to_the_system():
    def resident() -> int:
        gc.collect()
        # what a step's temporaries leave to the allocator is not held
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    # what the first compiled step loads stays
    run(compiled(StaticModel(max_len=512, layers=1, batch=3))[0], tokens_of(1, 3), 300)
    model = StaticModel(max_len=5_000, layers=1, batch=65)
    for buffer in model.buffers_of_layers:
        buffer.normal_()
    step, log = compiled(model)
    before = resident()
    run(step, tokens_of(1, 65), 300)
    size = sum(buffer.nbytes for buffer in model.buffers_of_layers)
    found = held(log)
    assert found["released_bytes"] > 0.99 * size
    assert before - resident() > 0.5 * size, "packed tokens of all slots take at most an eighth of float32"


def test_an_outside_write_to_a_packed_buffer_raises():
    model = StaticModel()
    step, _ = compiled(model)
    run(step, tokens_of(PROMPT), 0, PROMPT)
    run(step, tokens_of(3), PROMPT)
    model.layers[1].v_cache[:, :, 5] = 1.0
    with pytest.raises(
        RuntimeError, match="buffers of layer 1 were written outside of the compiled graphs while their 104"
    ):
        run(step, tokens_of(1), PROMPT + 3)


def test_an_outside_read_of_a_packed_buffer_is_zero_for_its_views_too():
    model = StaticModel()
    step, _ = compiled(model)
    view = model.layers[0].k_cache[:, 1, 3:]
    run(step, tokens_of(PROMPT), 0, PROMPT)
    assert view.any()
    run(step, tokens_of(1), PROMPT)
    assert not view.any()


@pytest.mark.parametrize(
    ("prefill", "update"), [("compiled", "setitem"), ("eager", "tokens_first"), ("compiled", "slices")]
)
def test_a_prompt_from_position_0_on_starts_a_new_sequence(prefill, update, lossless):
    model = StaticModel(update=update)
    dense = copy.deepcopy(model)
    step, log = compiled(model, plan=lossless)
    for prompt, seed in ((PROMPT, 1), (77, 5), (130, 7)):
        tokens = tokens_of(prompt, 1, seed)
        out = run(step if prefill == "compiled" else model, tokens, 0, prompt)
        close(out, run(dense, tokens, 0, prompt))
        tokens = tokens_of(9, 1, seed + 1)
        close(run(step, tokens, prompt), run(dense, tokens, prompt))
        assert held(log)["tokens"] == prompt + 9


def test_several_tokens_a_step_and_later_long_chunks_use_the_packed_tokens(lossless):
    model = StaticModel()
    dense = copy.deepcopy(model)
    step, log = compiled(model, plan=lossless)
    prefilled(dense, (step, log))
    for chunk, start in ((5, PROMPT), (31, PROMPT + 10), (8, PROMPT + 41)):
        tokens = tokens_of(10 if chunk == 5 else chunk, 1, start)
        close(run(step, tokens, start, chunk), run(dense, tokens, start, chunk))
    assert held(log)["tokens"] == PROMPT + 49


def test_a_step_further_back_drops_what_came_after_it(lossless):
    model = StaticModel()
    dense = copy.deepcopy(model)
    step, log = compiled(model, plan=lossless)
    prefilled(dense, (step, log))
    for start, count in ((PROMPT, 10), (PROMPT + 4, 6)):
        tokens = tokens_of(count, 1, start)
        close(run(step, tokens, start), run(dense, tokens, start))
    with pytest.raises(ValueError, match="position 120 comes after a gap: 111 tokens are held"):
        run(step, tokens_of(1), 120)
    with pytest.raises(ValueError, match="cannot remove 71 of 111 tokens"):
        run(step, tokens_of(1), 40)
    with pytest.raises(ValueError, match="positions 190 to 194: the buffers end at 192"):
        run(step, tokens_of(5), 190, 5)
    for packed in log.caches[0].held.values():
        assert all(map(operator.is_, packed.state, packed.layer.state().flatten()[0])), (
            "what a graph is given is what is written"
        )


@pytest.mark.parametrize("other", [[5, 7], [6, 7], [5], [5, 6, 7]])
def test_positions_are_the_same_and_consecutive_in_all_layers(other):
    assert span_of([torch.tensor([5, 6]), torch.tensor([5, 6]), torch.tensor([5, 6], dtype=torch.int32)]) == (5, 2)
    with pytest.raises(ValueError, match="must be consecutive and the same for all layers"):
        span_of([torch.tensor([5, 6]), torch.tensor(other)])
    with pytest.raises(ValueError, match="must be consecutive"):
        span_of([torch.tensor([5, 7])] * 2)


def test_buffers_with_few_tokens_stay_dense_until_there_are_64():
    model = StaticModel()
    dense = copy.deepcopy(model)
    step, log = compiled(model)
    tokens = tokens_of(64)
    close(run(step, tokens, 0), run(dense, tokens, 0))
    assert held(log) is None and model.layers[0].k_cache.any()
    run(step, tokens_of(1), 64)
    assert held(log)["tokens"] == 65


def test_the_graphs_of_one_torch_compile_share_packed_state_without_a_log(lossless):
    model = StaticModel()
    dense = copy.deepcopy(model)
    options = {"own_cache": True, "plan": lossless, "inner": "eager"}
    step = torch.compile(model, backend="attentionpack", options=options)
    for prompt in (PROMPT, 80):
        prefilled(dense, (step, None), prompt)
        for start, chunk in ((prompt, 1), (prompt + 3, 3)):
            tokens = tokens_of(3, 1, start)
            close(run(step, tokens, start, chunk), run(dense, tokens, start, chunk))
        assert not model.layers[0].k_cache.any()


def test_packed_state_goes_with_its_buffers():
    model = StaticModel()
    step, log = compiled(model)
    run(step, tokens_of(PROMPT), 0, PROMPT)
    run(step, tokens_of(1), PROMPT)
    cache = weakref.ref(next(iter(log.caches[0].held.values())).cache)
    del model, step
    torch._dynamo.reset()
    gc.collect()
    assert not log.caches[0].held and cache() is None
    assert held(log)["tokens"] == PROMPT, "as it was when it was packed"


def test_a_plan_from_static_buffers_can_be_saved_and_used_again(tmp_path):
    model = StaticModel()
    step, log = compiled(model, ratio=6)
    tokens = tokens_of(PROMPT)
    run(step, tokens, 0, PROMPT)
    expected = run(step, tokens_of(5), PROMPT)
    (plan,) = log.plans
    plan.save(tmp_path / "plan")
    torch._dynamo.reset()
    again, _ = compiled(StaticModel(), plan=str(tmp_path / "plan"))
    run(again, tokens, 0, PROMPT)
    torch.testing.assert_close(run(again, tokens_of(5), PROMPT), expected)


def test_a_plan_for_another_model_is_refused(tmp_path, lossless):
    step, _ = compiled(StaticModel(layers=3), plan=lossless)
    run(step, tokens_of(PROMPT), 0, PROMPT)
    with pytest.raises(
        ValueError, match=r"plan is for 2 layers, 2 KV heads x 16, torch.float32; the graph has 3 pairs"
    ):
        run(step, tokens_of(1), PROMPT)
    a_vl = half_plan([0, 1], apack_compile.AVLOptions())
    replace(a_vl, signature=(2, KV_HEADS, HEAD_DIM, "torch.float32")).save(tmp_path / "a_vl")
    step, _ = compiled(StaticModel(), plan=str(tmp_path / "a_vl"))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a plan with tiers cannot serve static buffers"):
        run(step, tokens_of(1), 70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"own_cache": 1}, "option own_cache=1: expected one of True, False"),
        ({"ratio": 4}, "option ratio=4: only with own_cache=True"),
        ({"plan": "x"}, "option plan='x': only with own_cache=True"),
        ({"own_cache": True, "ratio": 1}, "option ratio=1: expected a finite number > 1"),
        ({"own_cache": True, "ratio": 4, "plan": "x"}, "exclude each other"),
        ({"log": []}, "option log=[]: expected an apack_compile.GraphLog"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    step = torch.compile(StaticModel(), backend="attentionpack", options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(step, tokens_of(1), 0)
    assert message in str(caught.value)


def test_of_two_layers_the_one_whose_attention_packed_state_cannot_serve_stays_dense(lossless):
    class Softcapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = StaticModel()
            self.last = copy.deepcopy(self.model.layers[1])

        def forward(self, tokens, at, start=0):
            x, last = self.model.embedding(tokens), self.last
            x = x + self.model.layers[0](x, self.model.causal[None, None, at], at, start)
            query, key, value = (
                layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (last.query, last.key, last.value)
            )
            last.k_cache[:, :, at], last.v_cache[:, :, at] = key, value
            keys, values = (states.repeat_interleave(2, dim=1) for states in (last.k_cache, last.v_cache))
            scores = torch.tanh(query @ keys.mT / 30.0) * 30.0
            weights = scores.masked_fill(~self.model.causal[None, None, at], float("-inf")).softmax(-1)
            return self.model.head(x + last.out((weights @ values).transpose(1, 2).flatten(2)))

    model = Softcapped()
    dense = copy.deepcopy(model)
    step, log = compiled(model, strict=False, ratio=3)
    prefilled(dense, (step, log))
    tokens = tokens_of(4, 1, 2)
    out, expected = run(step, tokens, PROMPT), run(dense, tokens, PROMPT)
    assert 0 < float((out - expected).norm() / expected.norm()) < 0.05
    assert [match.reason for match in log.graphs[1].static_buffers] == [None, "softcap 30: attend has none"]
    assert model.last.k_cache.any() and not model.model.layers[0].k_cache.any()


class Watched(StaticModel):
    """Something besides the attention reads a buffer."""

    def forward(self, tokens, at, start=0):
        return super().forward(tokens, at) + self.layers[0].k_cache.sum()


def test_what_is_refused_stays_dense_is_listed_and_strict_raises():
    model = Watched()
    dense = copy.deepcopy(model)
    step, log = compiled(model, strict=False)
    prefilled(dense, (step, log))
    tokens = tokens_of(3, 1, 2)
    out, expected = run(step, tokens, PROMPT), run(dense, tokens, PROMPT)
    reasons = {match.layer: match.reason for match in log.graphs[1].static_buffers}
    assert reasons == {"layers.0": "unpack's tokens are used by output, not only by attention", "layers.1": None}
    assert model.layers[0].k_cache.any() and not model.layers[1].k_cache.any()
    assert float((out - expected).norm() / expected.norm()) < 0.05
    assert "unpack's tokens are used by output" in str(apack_compile.report(log))
    torch._dynamo.reset()
    step, _ = compiled(Watched())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(step, tokens, PROMPT)
    assert isinstance(caught.value.inner_exception, StrictError)
    assert "layers.0: unpack's tokens are used by output" in str(caught.value)


def test_a_graph_that_reads_packed_buffers_otherwise_raises_until_they_are_forgotten():
    model = StaticModel()

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, at, reads: bool):
            return self.model.layers[0].k_cache.sum() if reads else self.model(tokens, at)

    step, log = compiled(Reader())
    at = torch.arange(PROMPT)
    step(tokens_of(PROMPT), at, False)
    step(tokens_of(1), at[-1:] + 1, False)
    with pytest.raises(RuntimeError, match="buffers of layer 0 are packed, and this graph reads them"):
        step(tokens_of(1), at[-1:], True)
    log.forget()
    assert not log.caches[0].held
    assert float(step(tokens_of(1), at[-1:], True)) == 0


def test_buffers_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = StaticModel()
        step, _ = compiled(model)
        run(step, tokens_of(PROMPT), 0, PROMPT)
        with pytest.raises(ValueError, match="buffers made in inference mode"):
            run(step, tokens_of(1), PROMPT)


def tiny_model(config: type[PretrainedConfig] = LlamaConfig, **changes: float) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(
        config(num_attention_heads=4, num_key_value_heads=2, **sizes, **changes)
    ).eval()


def test_a_static_cache_passed_to_a_model_is_packed(lossless):
    model = tiny_model()
    step, log = compiled(model.forward, plan=lossless)
    ours, theirs = (StaticCache(config=model.config, max_cache_len=192) for _ in range(2))
    for prompt in (90, 70):
        ours.reset(), theirs.reset()
        tokens = torch.randint(64, (2, prompt + STEPS))
        for cache in (ours, theirs):
            model(tokens[:, :prompt], past_key_values=cache)
        for i in range(prompt, prompt + STEPS):
            token = tokens[:, i : i + 1].contiguous()
            close(step(token, past_key_values=ours).logits, model(token, past_key_values=theirs).logits)
        assert not ours.layers[1].values.any()
    assert held(log)["tokens"] == 2 * (70 + STEPS)
    assert len(log.graphs) == 1 and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("config", "ratio", "spread", "allowed"),
    # with a wide spread single keys decide, which shows one whose components are in the wrong order
    [(LlamaConfig, 4, 0.02, 0.15), (LlamaConfig, 6, 0.02, 0.15), (CohereConfig, 1.3, 0.2, 0.02)],
)
def test_a_plan_of_an_optimized_model_serves_its_static_cache(config, ratio, spread, allowed, tmp_path):
    model = tiny_model(config, initializer_range=spread)
    tokens = torch.randint(64, (1, 1_200))
    apack_compile.optimize(model, ratio=ratio, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": tokens})
    plan = apack_compile.plan_for(model, 1_024)
    assert plan.rotation.interleaved == (config is CohereConfig) and (plan.coarse is not None) == (ratio == 6)
    plan.save(tmp_path / "plan")
    apack_compile.restore(model)
    step, log = compiled(model.forward, plan=str(tmp_path / "plan"))
    ours, theirs = (StaticCache(config=model.config, max_cache_len=256) for _ in range(2))
    prompt = tokens[:, 300:500]
    for cache in (ours, theirs):
        model(prompt, past_key_values=cache)
    for token in tokens[:, 500:505].split(1, dim=1):
        token = token.clone(memory_format=torch.contiguous_format)
        out, expected = step(token, past_key_values=ours).logits, model(token, past_key_values=theirs).logits
        assert float((out - expected).norm() / expected.norm()) < allowed
    assert held(log)["tokens"] == 205


def test_generate_with_a_static_cache_gives_the_dense_tokens(lossless):
    model, log = tiny_model(), apack_compile.GraphLog()
    options = {"own_cache": True, "inner": "eager", "strict": True, "log": log, "plan": lossless}
    config = CompileConfig(backend="attentionpack", mode=None, options=options)
    config._compile_all_devices = True
    for prompt in (90, 110, 70):
        tokens = torch.randint(64, (1, prompt))
        how = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
        expected = model.generate(tokens, **how).sequences
        out = model.generate(tokens, cache_implementation="static", compile_config=config, **how)
        assert out.sequences.tolist() == expected.tolist()
        assert not out.past_key_values.layers[1].keys.any()
    assert len(log.graphs) == 2, "one for the first length of the cache, one for any"
