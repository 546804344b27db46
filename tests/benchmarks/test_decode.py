"""The whole-model benchmark: its caches hold what the model computed, its plans can be used, its figures belong together."""

import weakref

import decode
import models
import pytest
import torch
import typer
from models import Packing
from typer.testing import CliRunner

import apack_compile
from apack_compile.backend.backend import make_backend
from apack_compile.plan.check import check_plan

SHAPE = "SmolLM2-135M"


@pytest.fixture(scope="module")
def subject():
    """One layer of SmolLM2's shape with 96 tokens, in float32."""
    torch.manual_seed(0)
    return models.random_subject(SHAPE, 1, 96, 2, Packing(4.0, 0), torch.float32, "cpu")


@pytest.mark.parametrize(("groups", "key_block"), [(1, 0), (3, 32)])
def test_a_random_plan_is_one_that_a_cache_can_use(subject, groups, key_block):
    plan = models.random_plan(subject.model, SHAPE, Packing(4.0, key_block, groups), 2_048)
    check_plan(plan, "plan")
    assert plan.groups == groups
    assert (0 if plan.rotation is None else plan.rotation.block) == key_block
    assert all(stream.expected_error == 1 for stream in plan.layers[0].streams)


@torch.no_grad()
def test_both_caches_go_on_from_the_prompt_that_was_read(subject):
    subject.prepare()
    dense, _, token = decode.prefilled(subject, decode.dense_cache(subject), "cpu")
    states = [(layer.keys.clone(), layer.values.clone()) for layer in dense.layers]
    static = decode.static_cache(subject, states, room=8)
    packed, seconds = decode.compacted(subject, states, 8, "cpu")
    assert seconds > 0
    assert static.layers[0].keys.shape[2] == 96 + 8
    assert int(static.get_seq_length()) == int(packed.get_seq_length()) == 96
    wanted = subject.model(input_ids=token, past_key_values=dense).logits
    torch.testing.assert_close(subject.model(input_ids=token, past_key_values=static).logits, wanted)
    # what the plan drops of random states is much, but a lost or doubled prompt would cost more
    direct, _, _ = decode.prefilled(subject, apack_compile.new_cache(subject.model, 8), "cpu")
    got, again = (subject.model(input_ids=token, past_key_values=cache).logits for cache in (packed, direct))
    torch.testing.assert_close(got, again)


@torch.no_grad()
def test_steps_go_on_and_the_packed_cache_never_runs_out_of_room(subject):
    subject.prepare()
    cache, _, token = decode.prefilled(subject, apack_compile.new_cache(subject.model, 1), "cpu")
    compiled = torch.compile(subject.model.forward, backend=make_backend(inner="eager"))
    step = decode.stepper(subject, cache, token, compiled)
    for _ in range(40):
        step()
    assert int(cache.get_seq_length()) == 96 + 40


@torch.no_grad()
def test_steady_memory_is_what_a_cache_gives_back(subject):
    subject.prepare()
    dense, _, token = decode.prefilled(subject, decode.dense_cache(subject), "cpu")
    states = [(layer.keys, layer.values) for layer in dense.layers]
    caches = {
        "dense": decode.static_cache(subject, states, 32),
        "packed": decode.compacted(subject, states, 32, "cpu")[0],
    }
    steps = {name: decode.stepper(subject, cache, token, subject.model) for name, cache in caches.items()}
    decode.timed_steps(steps, 1, "cpu")
    watched = {name: weakref.ref(cache) for name, cache in caches.items()}
    found = decode.steady_memory(caches, steps, lambda: sum(cache() is not None for cache in watched.values()))
    assert found == {"dense_steady_bytes": 1, "packed_steady_bytes": 1}


@pytest.mark.slow
@torch.no_grad()
def test_figures_of_a_row_belong_together(subject):
    row = decode.measured(subject, Packing(4.0, 0), "cpu", rounds=1, budget=1.0)
    assert row["compaction_share"] == pytest.approx(row["compaction_seconds"] / row["prefill_dense_seconds"])
    assert row["speedup_vs_dense"] == pytest.approx(row["dense_step_ms"] / row["packed_step_ms"])
    assert row["dense_tokens_per_second"] == pytest.approx(2 / row["dense_step_ms"] * 1e3)
    faster = row["packed_tokens_per_second"] / row["shared_heads_tokens_per_second"]
    assert row["speedup_vs_shared_heads"] == pytest.approx(faster)
    assert row["dense_cache_bytes"] == 2 * 2 * 96 * 3 * 64 * 4
    # 30 layers of 96 tokens, of two sequences the half
    assert row["dense_largest_batch"] == 2**30 // (row["dense_cache_bytes"] * 30 // 2)
    assert row["packed_largest_batch"] > row["dense_largest_batch"]
    assert (row["layers"], row["model_layers"]) == (1, 30)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--preset", "a-vl"], "preset='a-vl' must be 'attentionpack'"),
        (["--preset", "attentionpack", "--ratio", "4"], "exclude each other"),
        (["--shape", "GPT-2"], "shape='GPT-2' is not one of"),
    ],
)
def test_impossible_runs_are_refused(options, complaint):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(decode.main)
    result = CliRunner().invoke(app, [*options, "--device", "cpu"], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and complaint in " ".join(result.output.replace("│", "").split())
