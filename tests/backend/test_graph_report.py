"""What a torch.compile leaves dense is in the report of its log, with what to do about it."""

import json

import pytest
import torch
from static_models import StaticModel, run, tokens_of

import apack_compile


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def logged(model, **options):
    """The model after a prompt of 70 tokens and a step, and the report."""
    log = apack_compile.GraphLog()
    options = {"inner": "eager", "log": log, **options}
    step = torch.compile(model, backend="attentionpack", fullgraph=True, options=options)
    prompt, token = tokens_of(70), tokens_of(1)
    out = [run(step, prompt, 0, 70), run(step, token, 70)]
    return out, apack_compile.report(log)


def test_a_dense_cache_is_lossless_and_the_report_says_that_its_bytes_are_unchanged():
    model, plain = StaticModel(), StaticModel()
    out, report = logged(model)
    expected = [run(plain, tokens_of(70), 0, 70), run(plain, tokens_of(1), 70)]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.buffers_of_layers, plain.buffers_of_layers, rtol=1e-6, atol=1e-6)
    size = sum(buffer.nbytes for buffer in model.buffers_of_layers)
    text = str(report)
    assert f"dense caches of {size:,} bytes stay as they are, their bytes are unchanged" in text
    assert "options={'own_cache': True}" in text and "apack_compile.optimize(model)" in text
    statuses = [(line.what, line.status) for line in report.lines if line.graph == 1 and line.layer == "layers.0"]
    assert statuses == [("attention", "shared heads"), ("key cache", "unchanged"), ("value cache", "unchanged")]
    assert report.graphs == 2 and report.bytes is None
    json.dumps(report.to_dict())


def test_with_own_cache_the_report_has_the_bytes_before_and_after():
    _, report = logged(StaticModel(), own_cache=True, strict=True)
    assert [line.status for line in report.lines] == ["packed"] * 4
    assert report.bytes["buffer_bytes"] == 4 * 192 * 2 * 16 * 4
    assert report.bytes["packed_bytes"] * 3.9 < report.bytes["dense_bytes"]
    assert "98,304 bytes before (49,152 in 16 bits)" in str(report)
    assert not any("unchanged" in note for note in report.notes)


def test_without_an_attention_or_a_cache_the_report_is_empty():
    log = apack_compile.GraphLog()
    torch.compile(lambda x: x + 1, backend="attentionpack", options={"log": log, "inner": "eager"})(torch.ones(2))
    report = apack_compile.report(log)
    assert (report.graphs, report.lines, report.notes) == (1, (), ())


def test_the_report_of_a_model_that_is_not_optimized_names_the_log():
    with pytest.raises(ValueError, match="pass report the GraphLog of its option log"):
        apack_compile.report(StaticModel())
