"""Decode compiles once, at every site, and keeps compiling to nothing new."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from vlms import build, prompt

import apack_compile


@pytest.fixture(autouse=True)
def fresh_counters(fresh_compiler):
    counters.clear()


@pytest.mark.parametrize("setting", [{"preset": "lossless"}, {"preset": "attentionpack"}, {"ratio": 3}], ids=str)
def test_64_decode_steps_use_one_graph_and_break_nowhere(setting):
    model, placeholders = build("llava")
    inputs = prompt("llava", [[30, 10], [5, 8, 8]], placeholders)
    apack_compile.optimize(model, compile="eager", strict=True, **setting, min_tokens=0)
    model.generate(**inputs, max_new_tokens=65, do_sample=False)
    graphs = apack_compile.report(model).graphs
    assert len(graphs) == 1
    assert not counters["graph_break"]
    for graph in graphs:
        fused = next(p for p in graph["passes"] if p["name"] == "FuseAttend")
        assert fused["count"] == 3


def test_a_second_prompt_of_another_length_reuses_the_graph():
    model, placeholders = build("llava")
    apack_compile.optimize(model, preset="lossless", compile="eager")
    for rows in ([[30, 10], [5, 8, 8]], [[50, 12], [15, 18, 9]], [[90, 2], [1, 2, 3]]):
        model.generate(**prompt("llava", rows, placeholders), max_new_tokens=20, do_sample=False)
    assert len(apack_compile.report(model).graphs) == 1


def test_growing_past_the_expected_tokens_keeps_the_graph_and_the_tokens():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[30, 10]], placeholders)
    dense = model.generate(**inputs, max_new_tokens=150, do_sample=False)
    apack_compile.optimize(model, preset="lossless", compile="eager")
    cache = apack_compile.new_cache(model, max_new_tokens=150)
    packed = model.generate(**inputs, max_new_tokens=150, do_sample=False, past_key_values=cache)
    assert torch.equal(packed, dense)
    assert len(apack_compile.report(model).graphs) == 1
    assert cache.index.positions[2].shape[1] < 250


def test_inductor_gives_the_dense_tokens():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[30, 10], [5, 8, 8]], placeholders)
    dense = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    apack_compile.optimize(model, preset="lossless", compile="inductor")
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), dense)
    assert [line.status for line in apack_compile.report(model).layers] == ["rewritten"] * 3


def test_attention_spelled_as_a_softmax_between_two_products_is_rewritten_in_every_layer():
    model, placeholders = build("llava")
    model.set_attn_implementation("eager")
    inputs = prompt("llava", [[30, 10], [5, 8, 8]], placeholders)
    dense = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    apack_compile.optimize(model, preset="lossless", compile="eager", strict=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), dense)
    report = apack_compile.report(model)
    assert [line.status for line in report.layers] == ["rewritten"] * 3
    assert {site["details"]["spelling"] for graph in report.graphs for site in graph["passes"][0]["matches"]} == {
        "matmul"
    }


def test_compiled_and_eager_decode_agree_for_a_lossy_plan():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[60, 10], [5, 48, 8]], placeholders)
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt("llava", [[90, 90, 90]], placeholders, seed=5))
    eager = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    apack_compile.optimize(model, ratio=3, compile="eager", min_tokens=0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), eager)


def test_a_model_compiled_whole_prefills_and_decodes_right():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[30, 10]], placeholders)
    with torch.no_grad():
        dense = model(**inputs).logits
        apack_compile.optimize(model, preset="lossless", compile="none")
        model.compile(backend="attentionpack", options={"inner": "eager"})
        cache = apack_compile.new_cache(model)
        packed = model(**inputs, past_key_values=cache).logits
    torch.testing.assert_close(packed, dense)
    vision = cache.index.positions[1]
    assert sorted(vision[0].tolist()) == (inputs["input_ids"][0] == 90).nonzero()[:, 0].tolist()


def test_the_backend_is_found_by_name_in_a_process_that_never_imported_us():
    code = (
        "import torch\n"
        "f = torch.compile(lambda x: x.sin() + 1, backend='attentionpack', options={'inner': 'eager'})\n"
        "x = torch.randn(5)\n"
        "assert torch.equal(f(x), x.sin() + 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
