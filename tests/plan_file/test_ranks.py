"""Plans under tensor parallelism: of the heads that a rank has, in one file for all ranks."""

from dataclasses import replace

import pytest
from saved_plans import assert_equal, llama, write

import apack_compile
from apack_compile import Plan
from apack_compile.plan import file as plan_file
from apack_compile.plan.ranks import Ranks


def test_a_file_holds_the_plans_of_all_ranks(plan, tmp_path, monkeypatch):
    path = tmp_path / "plan"
    parts = [replace(plan, ranks=Ranks(rank, 2), tail_slots=rank) for rank in range(2)]
    monkeypatch.setattr(plan_file, "rank_here", lambda count: 1)
    parts[0].save(path)
    with pytest.raises(ValueError, match=r"holds the ranks \[0\] of 2, not 1; save the plan on every rank"):
        Plan.load(path)
    parts[1].save(path)
    for rank, part in enumerate(parts):
        monkeypatch.setattr(plan_file, "rank_here", lambda count, rank=rank: rank)
        assert_equal(Plan.load(path), part)
    replace(parts[1], tail_slots=7).save(path)
    assert Plan.load(path).tail_slots == 7
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        Plan.load(path)
    # what is damaged is not taken into a file with a right checksum
    parts[1].save(path)
    monkeypatch.setattr(plan_file, "rank_here", lambda count: 0)
    with pytest.raises(ValueError, match=r"holds the ranks \[1\] of 2, not 0"):
        Plan.load(path)
    # a plan of one rank takes the file's place
    plan.save(path)
    assert Plan.load(path).ranks == Ranks(0, 1)


def part_of(plan, rank, count=2, plan_id="a", window_id="a"):
    """A rank's part of a plan with a window."""
    ranks = Ranks(rank, count)
    other = replace(plan, layers={1: plan.layers[1]}, bases={1: plan.bases[1]}, ranks=ranks, window=9)
    other = replace(other, provenance=replace(plan.provenance, plan_id=window_id))
    first = replace(plan, layers={0: plan.layers[0]}, bases={0: plan.bases[0]}, ranks=ranks, windows={9: other})
    return replace(first, provenance=replace(plan.provenance, plan_id=plan_id))


@pytest.mark.parametrize(
    ("older", "kept"),
    [
        ({}, True),
        ({"plan_id": "b"}, False),
        ({"window_id": "b"}, False),
        ({"plan_id": None, "window_id": None}, False),
        ({"count": 3}, False),
    ],
)
def test_parts_of_another_plan_do_not_stay(plan, tmp_path, monkeypatch, older, kept):
    path = tmp_path / "plan"
    for rank in (0, 1):
        part_of(plan, rank, **older).save(path)
    made = part_of(plan, 0)
    made.save(path)
    monkeypatch.setattr(plan_file, "rank_here", lambda count: 0)
    assert_equal(Plan.load(path), made)
    assert Plan.load(path).provenance.plan_id == Plan.load(path).windows[9].provenance.plan_id == "a"
    monkeypatch.setattr(plan_file, "rank_here", lambda count: 1)
    if kept:
        assert_equal(Plan.load(path), part_of(plan, 1))
    else:
        with pytest.raises(ValueError, match=r"holds the ranks \[0\] of 2, not 1; save the plan on every rank"):
            Plan.load(path)
    part_of(plan, 1).save(path)
    assert_equal(Plan.load(path), part_of(plan, 1))


def test_parts_of_an_earlier_format_are_read_and_do_not_stay(plan, tmp_path, monkeypatch):
    path, older = tmp_path / "plan", ("window", "windows", "plan_id")
    values = {name: value for name, value in plan_file.values_of(plan).items() if name not in older}
    tensors = {f"rank{rank}.{name}": t for rank in (0, 1) for name, t in plan_file.tensors_of(plan).items()}
    write(path, {"count": 2, "ranks": {"0": values, "1": values}}, tensors, version="5")
    monkeypatch.setattr(plan_file, "rank_here", lambda count: 1)
    assert_equal(Plan.load(path), replace(plan, ranks=Ranks(1, 2)))
    part_of(plan, 0).save(path)
    with pytest.raises(ValueError, match=r"holds the ranks \[0\] of 2, not 1"):
        Plan.load(path)


def test_a_plan_of_other_ranks_is_refused(plan):
    model = llama()
    with pytest.raises(
        ValueError, match=r"plan: made on rank 1 of 2 of tensor parallelism; this model is on rank 0 of 1"
    ):
        apack_compile.optimize(model, plan=replace(plan, ranks=Ranks(1, 2)))
    assert "generate" not in vars(model)
