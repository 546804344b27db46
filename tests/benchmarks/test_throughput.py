"""Throughput at equal bytes: every way decodes what the model says, in its budget, and its figures belong together."""

import pytest
import throughput
import torch
import typer
from decode import dense_cache, prefilled
from models import Packing, random_subject
from throughput import DENSE, PACKED, PACKED_EQUAL
from typer.testing import CliRunner

SHAPE, TOKENS, DENSE_BATCH = "SmolLM2-135M", 300, 3


@pytest.fixture
def subject():
    """One layer of SmolLM2's shape."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    return random_subject(SHAPE, 1, TOKENS, 1, Packing(4.0, 64), torch.float32, "cpu")


@torch.no_grad()
def test_every_way_says_what_the_model_says(subject):
    subject.prepare()
    cache, _, token = prefilled(subject, dense_cache(subject), "cpu")
    states = [(layer.keys, layer.values) for layer in cache.layers]
    wanted = subject.model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1)
    ways = throughput.contenders(subject, subject, states, token, (DENSE_BATCH, 5), "eager")
    assert [way.batch for way in ways.values()] == [DENSE_BATCH] * 4 + [5]
    for name, way in ways.items():
        before = int(way.cache.get_seq_length())
        said = way.step()
        assert said.shape == (way.batch, 1)
        assert int(way.cache.get_seq_length()) == before + 1 == TOKENS + 1
        if name in DENSE:
            assert said.unique().tolist() == wanted.tolist()


@torch.no_grad()
def test_figures_of_a_row_belong_together(subject):
    row = throughput.measured(subject, Packing(4.0, 64), DENSE_BATCH, rounds=1, inner="eager")
    throughput.against_the_best([row])
    ways = row["ways"]
    assert row["budget_bytes"] == DENSE_BATCH * TOKENS * 2 * 3 * 64 * 2
    assert ways[PACKED]["held_bytes"] <= row["budget_bytes"]
    # one more would not fit
    each = (ways[PACKED]["held_bytes"] - ways[PACKED_EQUAL]["held_bytes"]) / (row["packed_batch"] - DENSE_BATCH)
    assert ways[PACKED]["held_bytes"] + each > row["budget_bytes"]
    assert row["packed_batch"] > DENSE_BATCH == row["dense_batch"]
    best = max(DENSE, key=lambda name: ways[name]["tokens_per_second"])
    assert row["best_dense"] == best
    speeds = {name: way["tokens_per_second"] for name, way in ways.items()}
    assert row["throughput_at_equal_bytes"] == pytest.approx(speeds[PACKED] / speeds[best])
    assert row["throughput_at_equal_batch"] == pytest.approx(speeds[PACKED_EQUAL] / speeds[best])
    for way in ways.values():
        assert way["tokens_per_second"] == pytest.approx(1e3 * way["batch"] / way["step_ms"])


def test_a_row_is_compared_with_the_fastest_dense_way_of_any_dtype():
    def row(dtype: str, plan: str, dense: float, packed: float) -> dict:
        ways = {name: {"tokens_per_second": dense} for name in DENSE}
        ways |= {name: {"tokens_per_second": packed} for name in (PACKED, PACKED_EQUAL)}
        return {"shape": "a", "tokens": 5, "plan": plan, "dtype": dtype, "best_dense": DENSE[1], "ways": ways}

    rows = [row("float32", "p", 10.0, 30.0), row("bfloat16", "p", 2.0, 40.0), row("float32", "q", 100.0, 30.0)]
    throughput.against_the_best(rows)
    assert [each["throughput_at_equal_bytes"] for each in rows] == [3.0, 4.0, 0.3]
    assert rows[1]["best_dense_of_all"] == f"{DENSE[1]}, float32"


@torch.no_grad()
def test_memory_is_what_a_way_gives_back(subject, monkeypatch):
    subject.prepare()
    cache, _, token = prefilled(subject, dense_cache(subject), "cpu")
    states = [(layer.keys, layer.values) for layer in cache.layers]
    # large enough to be seen beside what an allocator keeps
    ways = throughput.contenders(subject, subject, states, token, (300, 300), "eager")
    held = {name: way.held for name, way in ways.items()}
    # what is compiled stays, and is no part of a cache
    for way in ways.values():
        for _ in range(2):
            way.step()
    if throughput.resident("VmRSS") is None:
        pytest.skip("the system does not say what a process has in memory")
    found = throughput.memory_of(ways)
    assert ways == {}
    for name in DENSE:
        assert found[name]["resident_bytes"] == pytest.approx(held[name], rel=0.25)
        assert found[name]["peak_resident_bytes"] >= found[name]["resident_bytes"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "GPT-2"], "model='GPT-2' is not one of"),
        (["--dense-batch", "0"], "dense-batch=0 must be at least 1"),
    ],
)
def test_impossible_runs_are_refused(options, complaint):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(throughput.main)
    result = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert result.exit_code == 2 and complaint in " ".join(result.output.replace("│", "").split())
