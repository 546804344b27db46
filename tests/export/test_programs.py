"""An exported program with packed caches does what the dense one did, and holds fewer bytes."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoders import UPDATES, Decoder, dense_plan, exported, index_copy, run, slices, token_ids

import apack_compile
from apack_compile.cache.accounting import storage_bytes
from apack_compile.kernels.state import TEXT, PackedState

CHUNKS = (9, *[1] * 40, 6, 2)
LONG = (300, *[1] * 40)


def packed_state(program) -> dict[str, torch.Tensor]:
    return {name: t for name, t in program.state_dict.items() if name.startswith("packed_cache.")}


def held_bytes(program) -> int:
    """Bytes of all buffers but the bases."""
    bases = ("mean", "decoder", "step")
    return storage_bytes(t for name, t in packed_state(program).items() if not name.endswith(bases))


@pytest.fixture(scope="module")
def long_program():
    return exported(Decoder(tokens=512))


@pytest.fixture(scope="module")
def packed_at_4(long_program):
    return apack_compile.optimize(long_program, ratio=4, calibration_inputs=(token_ids(400), torch.arange(400)))


FUNCTIONAL = ("setitem", "slices", "tokens_first")


@pytest.mark.parametrize(
    "name, decomposed", [*((name, False) for name in UPDATES), *((name, True) for name in FUNCTIONAL)]
)
def test_a_plan_that_keeps_tokens_as_they_are_gives_equal_outputs(name, decomposed):
    program = exported(Decoder([UPDATES[name]] * 2, dtype=torch.float64))
    if decomposed:
        program = program.run_decompositions({})
    ids = token_ids(60)
    try:
        dense = run(program, ids, CHUNKS)
    except TypeError as error:
        if not torch.__version__.startswith("2.11."):
            raise
        pytest.skip(f"torch {torch.__version__} cannot run the dense program either: {error}")
    packed = apack_compile.optimize(program, plan=dense_plan())
    torch.testing.assert_close(run(packed, ids, CHUNKS), dense)
    report = apack_compile.report(packed)
    assert {line.name for line in report.packed} == {"layers.0", "layers.1"}
    # float64 tokens against a dense cache in 16 bits
    (note,) = report.notes
    assert note.startswith("holds more than a 16-bit dense cache") and f"note: {note}" in str(report)


@pytest.mark.parametrize("tail_slots", [1, 8])
@pytest.mark.parametrize("batch, spelling", [(3, "sdpa"), (1, "matmul")])
def test_tokens_pass_through_the_tail_unchanged(batch, spelling, tail_slots):
    model = Decoder(batch=batch, spelling=spelling, dtype=torch.float64)
    program, ids = exported(model), token_ids(60, batch)
    packed = apack_compile.optimize(program, plan=dense_plan(tail_slots=tail_slots))
    torch.testing.assert_close(run(packed, ids, CHUNKS), run(program, ids, CHUNKS))
    torch.testing.assert_close(run(packed, ids, (2, 1, 1, 1, 30)), run(program, ids, (2, 1, 1, 1, 30)))


def test_in_float32_it_is_no_further_from_float64_than_the_dense_program():
    ids = token_ids(60)
    exact = run(exported(Decoder(dtype=torch.float64)), ids, CHUNKS)
    program = exported(Decoder())
    packed = apack_compile.optimize(program, plan=dense_plan(dtype=torch.float32))
    error, dense_error = ((run(p, ids, CHUNKS).double() - exact).abs().max() for p in (packed, program))
    assert error <= 3 * dense_error


def test_a_program_of_one_token_a_call_is_packed_too():
    program = exported(Decoder(dtype=torch.float64), dynamic=False)
    packed = apack_compile.optimize(program, plan=dense_plan())
    ids = token_ids(20)
    torch.testing.assert_close(run(packed, ids, [1] * 20), run(program, ids, [1] * 20))
    calls = [(ids[:, i : i + 1], torch.tensor([i])) for i in range(20)]
    assert apack_compile.report(apack_compile.optimize(program, ratio=2, calibration_inputs=calls)).packed


def test_ratio_4_holds_a_quarter_of_the_bytes_and_answers_nearly_the_same(long_program, packed_at_4):
    ids = token_ids(340, seed=2)
    dense = run(long_program, ids, LONG)
    calibration = (token_ids(400), torch.arange(400))
    coarser = apack_compile.optimize(long_program, ratio=8, calibration_inputs=calibration)
    errors = [float((run(p, ids, LONG) - dense).norm() / dense.norm()) for p in (packed_at_4, coarser)]
    assert 0 < errors[0] < errors[1] < 0.2
    assert (run(packed_at_4, ids, LONG).argmax(-1) == dense.argmax(-1)).double().mean() > 0.95
    report = apack_compile.report(packed_at_4)
    assert report.dense_bytes == 2 * 2 * 512 * 2 * 16 * 2
    assert report.sequence_bytes == held_bytes(packed_at_4)
    assert 4 <= report.ratio < 4.3
    assert 8 <= report.dense_bytes / held_bytes(coarser) < 9


def test_decode_reads_what_was_packed(packed_at_4, long_program):
    """Spoiled codes show: the answers above do not come from exact tokens kept somewhere."""
    ids = token_ids(340, seed=2)
    dense = run(long_program, ids, LONG)
    spoiled = packed_at_4.module()
    run(spoiled, ids, (300,))
    for name, buffer in spoiled.named_buffers():
        if name.endswith("value_codes"):
            buffer.zero_()
    with torch.no_grad():
        logits = spoiled(ids[:, 300:301], torch.arange(300, 301))
    assert (logits - dense[:, 300:301]).norm() > 0.1 * dense[:, 300:301].norm()


def test_attention_is_given_no_segment_that_is_never_filled(packed_at_4):
    attends = [node for node in packed_at_4.graph.nodes if node.target is torch.ops.apack.attend.default]
    assert len(attends) == len(apack_compile.report(packed_at_4).packed)
    for node in attends:
        state = PackedState.parse(*node.args[4:6])
        assert [segment.kind for segment in state.segments] == [TEXT]


def test_index_0_begins_a_new_sequence(packed_at_4):
    first, second = token_ids(340, seed=2), token_ids(340, seed=3)
    fresh = run(packed_at_4, second, LONG)
    module = packed_at_4.module()
    run(module, first, (2,))
    run(module, first, LONG)
    assert torch.equal(run(module, second, LONG), fresh)


def test_the_given_program_stays_as_it_is():
    program, ids = exported(Decoder([index_copy] * 2)), token_ids(60)
    before = run(program, ids, CHUNKS)
    graph, state = str(program.graph), {name: t.clone() for name, t in program.state_dict.items()}
    packed = apack_compile.optimize(program, ratio=2, calibration_inputs=(ids, torch.arange(60)))
    run(packed, token_ids(60, seed=5), CHUNKS)
    assert str(program.graph) == graph
    assert program.state_dict.keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in program.state_dict.items())
    assert torch.equal(run(program, ids, CHUNKS), before)
    weights = [p.state_dict["embedding.weight"].data_ptr() for p in (program, packed)]
    assert weights[0] == weights[1]


def test_signature_and_sizes_stay():
    program = exported(Decoder())
    packed = apack_compile.optimize(program, ratio=2, calibration_inputs=(token_ids(60), torch.arange(60)))
    assert packed.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert packed.call_spec.in_spec == program.call_spec.in_spec
    assert packed.call_spec.out_spec == program.call_spec.out_spec
    assert [(c.lower, c.upper) for c in packed.range_constraints.values()] == [
        (c.lower, c.upper) for c in program.range_constraints.values()
    ]
    assert not any(name.endswith(("cache.keys", "cache.values")) for name in packed.state_dict)
    assert set(program.constants) == {"causal"} == set(packed.constants)
    with pytest.raises(AssertionError, match=r"Guard failed: ids.size\(\)\[1\] <= 63"):
        run(packed, token_ids(70), (70,))


def test_the_functional_form_of_a_packed_program_runs_alike(packed_at_4):
    ids = token_ids(340, seed=2)
    functional = packed_at_4.run_decompositions({})
    assert functional.graph_signature.buffers_to_mutate
    assert torch.equal(run(functional, ids, LONG), run(packed_at_4, ids, LONG))


LOAD = """
import sys
import torch
import apack_compile.kernels

folder = sys.argv[1]
module = torch.export.load(f"{folder}/packed.pt2").module()
ids, chunks, expected = torch.load(f"{folder}/expected.pt")
start, logits = 0, []
with torch.no_grad():
    for count in chunks:
        logits.append(module(ids[:, start : start + count], torch.arange(start, start + count)))
        start += count
assert torch.equal(torch.cat(logits, dim=1), expected)
assert "transformers" not in sys.modules
"""


def test_a_saved_program_is_smaller_and_runs_in_another_process(long_program, packed_at_4, tmp_path: Path):
    ids = token_ids(340, seed=2)
    torch.export.save(long_program, tmp_path / "dense.pt2")
    torch.export.save(packed_at_4, tmp_path / "packed.pt2")
    torch.save((ids, LONG, run(packed_at_4, ids, LONG)), tmp_path / "expected.pt")
    report = apack_compile.report(packed_at_4)
    saved = (tmp_path / "dense.pt2").stat().st_size - (tmp_path / "packed.pt2").stat().st_size
    assert saved > report.dense_bytes - report.sequence_bytes
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert apack_compile.report(torch.export.load(tmp_path / "packed.pt2")) == report


def with_layouts(saved: Path, changed: Path, change: Callable[[dict], list]) -> None:
    """The saved program as an older or a newer version would have saved it: `change` gives the arguments of each operation."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("models/model.json"):
                program = json.loads(data)
                for node in program["graph_module"]["graph"]["nodes"]:
                    if node["target"].startswith("torch.ops.apack."):
                        node["inputs"] = change(node)
                data = json.dumps(program).encode()
            new.writestr(entry, data)


def without_layout(node: dict) -> list:
    return [argument for argument in node["inputs"] if argument["name"] not in ("state", "layout")]


def with_layout_9(node: dict) -> list:
    (layout,) = [argument["arg"]["as_ints"] for argument in node["inputs"] if argument["name"] == "layout"]
    layout[0] = 9
    return node["inputs"]


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (without_layout, "saved by an apack-compile 0.1.0 whose state had none"),
        (with_layout_9, "layout: version 9 must be 1"),
    ),
)
def test_a_program_of_another_version_says_which_one_and_what_to_do(packed_at_4, tmp_path, change, message):
    torch.export.save(packed_at_4, tmp_path / "packed.pt2")
    with_layouts(tmp_path / "packed.pt2", tmp_path / "other.pt2", change)
    program = torch.export.load(tmp_path / "other.pt2")
    for use in (lambda: run(program, token_ids(5), (5,)), lambda: apack_compile.report(program)):
        with pytest.raises(ValueError, match=rf"{message}.*make .* anew with optimize"):
            use()


def test_graph_modules_of_any_origin_give_graph_modules():
    model = Decoder([index_copy] * 2)
    ids, calibration = token_ids(60), (token_ids(60, seed=4), torch.arange(60))
    program = exported(model)
    expected = run(apack_compile.optimize(program, ratio=2, calibration_inputs=calibration), ids, CHUNKS)
    for given in (program.module(), torch.fx.symbolic_trace(model)):
        packed = apack_compile.optimize(given, ratio=2, calibration_inputs=calibration)
        assert isinstance(packed, torch.fx.GraphModule)
        torch.testing.assert_close(run(packed, ids, CHUNKS), expected)
        assert apack_compile.report(packed).ratio == apack_compile.report(packed).dense_bytes / (
            apack_compile.report(packed).sequence_bytes
        )
        assert any(name.endswith("cache.keys") for name, _ in given.named_buffers())


def test_slice_writes_are_packed_in_a_traced_module_with_its_input_as_start():
    program = exported(Decoder([slices] * 2, dtype=torch.float64))
    packed = apack_compile.optimize(program.module(), plan=dense_plan())
    ids = token_ids(60)
    torch.testing.assert_close(run(packed, ids, CHUNKS), run(program, ids, CHUNKS))


def test_positions_that_do_not_follow_raise(packed_at_4):
    module, ids = packed_at_4.module(), token_ids(340)
    run(module, ids, (5,))
    with torch.no_grad():
        with pytest.raises(ValueError, match="index: starts at 7, must be 5, the tokens held, or 0"):
            module(ids[:, :1], torch.tensor([7]))
        with pytest.raises(ValueError, match=r"index: positions \[5, 7\] must follow one another"):
            module(ids[:, :2], torch.tensor([5, 7]))
        module(ids[:, :1], torch.tensor([5]))
