"""The GPU benchmark's control flow: steps with limits, results after each, figures held against targets; on a CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import typer
from steps import Step, run_steps, script
from targets import TARGETS, Target, verdicts, with_time_per_token
from typer.testing import CliRunner

BENCHMARKS = Path(gpu.__file__).parent
WRITES = "import json, sys; json.dump({'rows': [{'tokens': 1}]}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))"


def step(code, limit=30.0, bench=None, **options):
    """A step that runs a line of Python."""
    return Step("step", ("-c", code), limit, bench, **options)


def run(steps, budget=60.0):
    """Rows of the steps, and what was kept after each."""
    kept = []
    return run_steps(steps, budget, lambda rows: kept.append(list(rows))), kept


def test_results_are_kept_after_each_step_and_a_failure_stops_nothing():
    rows, kept = run([step("raise SystemExit('broken')"), step(WRITES, bench="attend")])
    assert [len(rows) for rows in kept] == [1, 3]
    failed, done, written = rows
    assert failed["status"] == "failed with 1" and "broken" in failed["note"]
    assert done["status"] == "ok"
    assert written == {"bench": "attend", "tokens": 1}


def test_a_step_past_its_limit_is_ended_with_what_it_started_and_keeps_what_it_wrote(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = f"{WRITES}; import subprocess, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    rows, _ = run([step(code, limit=2.0, bench="attend")])
    assert rows[0]["status"] == "ended after 2 s"
    assert rows[1:] == [{"bench": "attend", "tokens": 1}]
    time.sleep(5)
    assert not mark.exists()


def test_steps_that_no_time_is_left_for_are_skipped_and_said():
    rows, _ = run([step("import time; time.sleep(2)"), step("pass")], budget=6.0)
    assert [row["status"] for row in rows] == ["ok", "skipped"]
    assert "no time left" in rows[1]["note"]


def test_a_step_that_cannot_run_says_why():
    rows, _ = run([step("pass", skip="no tool")])
    assert (rows[0]["status"], rows[0]["note"]) == ("skipped", "no tool")


def test_a_benchmark_that_writes_nothing_is_no_success():
    assert run([step("pass", bench="attend")])[0][0]["status"] == "wrote no rows"


def test_targets_take_the_worst_row_they_are_about():
    target = Target("t", "speedup_vs_dense", 2.0, {"bench": "attend", "batch": 1}, since=2048)
    row = {"bench": "attend", "batch": 1, "tokens": 4096, "speedup_vs_dense": 3.0}
    others = [{**row, "tokens": 512, "speedup_vs_dense": 0.1}, {**row, "batch": 2, "speedup_vs_dense": 0.1}]
    assert target.verdict([row, *others])["verdict"] == "met"
    missed = target.verdict([row, {**row, "speedup_vs_dense": 1.9}])
    assert (missed["verdict"], missed["found"], missed["wanted"]) == ("missed", 1.9, ">= 2")
    assert target.verdict(others)["verdict"] == "not measured"
    least = Target("t", "compaction_share", 0.05, most=True)
    shares = [{"compaction_share": share} for share in (0.01, 0.06)]
    assert [least.verdict(shares[:n])["verdict"] for n in (1, 2)] == ["met", "missed"]


def test_time_per_token_compares_128k_with_32k_of_the_same_plan():
    row = {"bench": "attend", "shape": "s", "plan": "p", "batch": 1, "tokens": 32_768, "packed_ms": 1.0}
    longer = {**row, "tokens": 131_072, "packed_ms": 5.0}
    assert with_time_per_token([row, longer])[1]["time_per_token_vs_32k"] == pytest.approx(1.25)
    assert with_time_per_token([row, {**longer, "plan": "q"}])[1] == {**longer, "plan": "q"}


def test_every_target_is_about_rows_that_the_full_run_measures():
    lines = [s.arguments for s in gpu.full_steps("cuda")]
    for target in TARGETS:
        wanted = [f"--{name} {target.rows[name]}" for name in ("shape", "tokens") if name in target.rows]
        # decode.py's batch is 1 by default
        if target.rows.get("batch", 1) > 1:
            wanted.append(f"--batch {target.rows['batch']}")
        script = f"{target.rows['bench']}.py"
        assert any(script in line[0] and all(pair in " ".join(line) for pair in wanted) for line in lines), target.name


def test_the_steps_that_targets_need_fit_in_the_budget_even_at_their_limits():
    assert gpu.BUDGET < 9 * 60
    about_targets = [s.limit for s in gpu.full_steps("cuda")[:8]]
    assert sum(about_targets) <= gpu.BUDGET


def test_options_of_the_steps_are_options_of_the_scripts():
    for bench in ("attend", "decode"):
        script_path = BENCHMARKS / f"{bench}.py"
        known = subprocess.run([sys.executable, script_path, "--help"], capture_output=True, text=True).stdout
        for one in (*gpu.full_steps("cuda"), *gpu.quick_steps("cpu")):
            if one.bench == bench:
                given = {argument for argument in one.arguments if argument.startswith("--")}
                assert all(option in known for option in given), (one.name, given)


@pytest.mark.slow
def test_a_dry_run_measures_writes_and_judges(tmp_path):
    path = tmp_path / "cpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--quick", "--json", path]
    done = subprocess.run([*command, "--only", "attention", "--only", "sanitizer"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    benches = [row["bench"] for row in found["rows"]]
    assert benches == ["steps", "attend", "attend", "steps", *["targets"] * len(TARGETS)]
    attention = found["rows"][1]
    assert attention["speedup_vs_dense"] > 0 and attention["share_of_limit"] > 0
    assert {"machine", "versions", "date"} <= found.keys()
    assert "not measured" in done.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--device", "tpu"], "device='tpu' must be cuda or cpu"),
        (["--device", "cpu"], "needs --quick"),
        (["--device", "cpu", "--quick", "--only", "nothing"], "in the name of no step"),
    ],
)
def test_impossible_runs_are_refused(options, complaint):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(gpu.main)
    result = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert result.exit_code == 2 and complaint in " ".join(result.output.replace("│", "").split())


def test_verdicts_name_every_target():
    assert [row["target"] for row in verdicts([])] == [target.name for target in TARGETS]
    assert script("n", "attend", 1.0).arguments == (str(BENCHMARKS / "attend.py"),)
