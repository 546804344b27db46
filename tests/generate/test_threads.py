"""Two threads, each with its own cache, on one model."""

import threading

import pytest
import torch
from llava_and_draft import calibrated, greedy, llava, picture

import apack_compile

PROMPTS = [picture([60, 20]), picture([30, 30, 12], seed=4)]
TOKENS = 40


def at_once(*calls) -> list:
    """The results of calls that begin together, each in a thread."""
    ready, results = threading.Barrier(len(calls)), [None] * len(calls)

    def work(i):
        ready.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


LOSSLESS, TIERS = {"preset": "lossless"}, {"preset": "a-vl"}
CASES = [(LOSSLESS, "none"), ({"ratio": 4}, "none"), (TIERS, "none"), (LOSSLESS, "eager"), (TIERS, "eager")]


@pytest.mark.parametrize(("setting", "compile"), CASES, ids=str)
def test_two_threads_get_the_tokens_of_one(setting, compile):
    model = calibrated(llava(), "none", **setting)
    alone = [greedy(model, inputs, TOKENS) for inputs in PROMPTS]
    apack_compile.optimize(model, compile=compile, **setting, min_tokens=0)
    for _ in range(2):
        together = at_once(*[lambda inputs=inputs: greedy(model, inputs, TOKENS) for inputs in PROMPTS])
        assert all(torch.equal(got, want) for got, want in zip(together, alone, strict=True)), together


def test_first_requests_of_two_threads_calibrate_once_and_leave_the_compiler_on():
    model = apack_compile.optimize(llava(), ratio=4, compile="eager", min_tokens=0)
    together = at_once(*[lambda inputs=inputs: greedy(model, inputs, TOKENS) for inputs in PROMPTS])
    assert all(torch.is_tensor(got) for got in together), together
    plan = apack_compile.plan_for(model, 80)
    greedy(model, PROMPTS[0], 3)
    assert apack_compile.plan_for(model, 80) is plan
    compiled = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph.forward)(torch.ones(3))
    assert compiled


def test_two_models_that_calibrate_at_once_leave_the_compiler_on():
    models = [apack_compile.optimize(llava(), ratio=4, compile="none", min_tokens=0) for _ in range(2)]
    for _ in range(4):
        errors = at_once(*[lambda model=model: apack_compile.calibrate(model, PROMPTS[0]) for model in models])
        assert not any(isinstance(error, BaseException) for error in errors), errors
    compiled = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph.forward)(torch.ones(3))
    assert compiled


def test_a_thread_that_compiles_does_not_change_what_another_s_eager_step_does():
    model = calibrated(llava(), preset="lossless")
    alone = greedy(model, PROMPTS[0], TOKENS)
    compiling, generated = threading.Event(), threading.Event()

    def backend(graph, _):
        compiling.set()
        generated.wait(120)
        return graph.forward

    def compile_meanwhile():
        torch.compile(lambda x: x.sin(), backend=backend)(torch.ones(3))

    def generate():
        compiling.wait(120)
        try:
            return greedy(model, PROMPTS[0], TOKENS)
        finally:
            generated.set()

    _, packed = at_once(compile_meanwhile, generate)
    assert torch.is_tensor(packed) and torch.equal(packed, alone), packed
