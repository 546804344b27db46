"""Two result files: rows matched by labels, figures compared, other files refused."""

import json

import pytest
import typer
from compare import ResultFileError, by_labels, main, moves, read_results
from typer.testing import CliRunner

ROW = {
    "shape": "Qwen", "tokens": 8192, "dense": "flash", "speedup_vs_dense": 2.0, "packed_ms": 1.0, "peak_bytes": 100,
    "limit_of_bytes_ms": 1.0, "share_of_limit": 0.5,
}  # fmt: skip


def compare(tmp_path, old, new, *options):
    """Runs the command on two lists of rows."""
    paths = []
    for name, rows in (("old", old), ("new", new)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"machine": "m", "versions": {}, "rows": rows}))
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [*map(str, paths), *options])


def test_figures_of_rows_with_the_same_labels_are_compared():
    other = {**ROW, "tokens": 512}
    new = {**ROW, "speedup_vs_dense": 3.0, "dense": "cuDNN", "peak_bytes": 50}
    found, gone, added = moves([ROW, other], [new, {**ROW, "shape": "Gemma"}])
    moved = {move.figure: move.ratio for move in found if move.ratio != 1}
    assert moved == {"speedup_vs_dense": 1.5, "peak_bytes": 0.5}
    assert gone == [(("shape", "Qwen"), ("tokens", 512))]
    assert added == [(("shape", "Gemma"), ("tokens", 8192))]


def test_a_column_of_one_file_alone_is_no_label():
    found, gone, added = moves([ROW], [{**ROW, "layers": 4}])
    assert len(found) == 5 and not gone and not added


def test_rows_about_the_same_are_numbered():
    assert len(by_labels([ROW, ROW], set(ROW))) == 2
    assert len(moves([ROW, ROW], [ROW])[1]) == 1


@pytest.mark.parametrize(
    ("figure", "value", "status"),
    [
        ("speedup_vs_dense", 1.7, 1), ("speedup_vs_dense", 1.9, 0), ("speedup_vs_dense", 9.0, 0),
        ("packed_ms", 1.2, 1), ("packed_ms", 0.2, 0), ("peak_bytes", 120, 1), ("peak_bytes", 105, 0),
        ("limit_of_bytes_ms", 9.0, 0), ("share_of_limit", 0.1, 1),
    ],
)  # fmt: skip
def test_worse_by_more_than_the_threshold_is_a_regression(tmp_path, figure, value, status):
    result = compare(tmp_path, [ROW], [{**ROW, figure: value}])
    assert result.exit_code == status
    assert ("REGRESSION" in result.output) == bool(status)


def test_the_threshold_is_an_option(tmp_path):
    slower = {**ROW, "speedup_vs_dense": 1.7}
    assert compare(tmp_path, [ROW], [slower], "--threshold", "0.2").exit_code == 0
    assert "1 worse by more than 10%" in compare(tmp_path, [ROW], [slower]).output


def test_a_figure_that_was_zero_does_not_divide(tmp_path):
    assert compare(tmp_path, [{**ROW, "packed_ms": 0.0}], [ROW]).exit_code == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"), ("[]", "machine, versions and rows"), ('{"rows": []}', "machine, versions and rows"),
        ('{"machine": 1, "versions": 1, "rows": [1]}', "list of objects"),
        ('{"machine": 1, "versions": 1, "rows": {}}', "list of objects"),
        ('{"machine": 1, "versions": 1, "rows": [{"a": [1]}]}', "flat, but 'a'"),
    ],
)  # fmt: skip
def test_files_of_other_shapes_are_refused_by_name(tmp_path, text, reason):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ResultFileError, match=reason) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_error_of_the_command(tmp_path):
    with pytest.raises(ResultFileError, match=r"gone\.json: cannot be read"):
        read_results(tmp_path / "gone.json")
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(tmp_path / "gone.json"), str(tmp_path / "gone.json")])
    assert result.exit_code == 2
