"""The table of versions in docs/support.md is that of the recorded runs, and stays when the page is written anew."""

import importlib.metadata
import json

from matrix import table, versions

JUNIT = """<testsuites>
<testsuite name="a" errors="1" failures="2" skipped="3" tests="10">
<testcase classname="a.b" /><testcase classname="a.c" /><testcase classname="a.b" />
</testsuite>
<testsuite name="b" errors="0" failures="0" skipped="0" tests="5" />
</testsuites>"""
RUN = {
    "python": "3.11.7",
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "date": "2026-01-02",
    "files": 2,
    "passed": 9,
    "failed": 0,
    "skipped": 1,
}


def test_a_run_is_counted_with_the_versions_of_its_interpreter(tmp_path):
    (tmp_path / "run.xml").write_text(JUNIT)
    run = versions.run_of(tmp_path / "run.xml")
    assert (run["passed"], run["failed"], run["skipped"]) == (9, 3, 3)
    assert run["torch"] == importlib.metadata.version("torch")


def test_a_column_is_replaced_and_the_others_stay(tmp_path, monkeypatch):
    page = tmp_path / "support.md"
    page.write_text("# Types\n\nText.\n\n## Pictures\n\n| a |\n\n## Sound\n")
    monkeypatch.setattr(versions, "PAGE", page)
    monkeypatch.setattr(versions, "RUNS", tmp_path / "versions.json")
    (tmp_path / "run.xml").write_text(JUNIT)
    (tmp_path / "versions.json").write_text(json.dumps({"oldest": RUN, "newest": RUN}))
    for _ in range(2):
        versions.main("newest", str(tmp_path / "run.xml"))
    written = page.read_text()
    assert "| oldest | 3.11.7 | 2.11.0 | 5.17.0 | 2026-01-02 | 2 | 9 | 0 | 1 |" in written
    assert written.count("## Versions") == written.count("| newest | ") == 1 and "| 2 | 9 | 3 | 3 |" in written
    assert (
        written.index("Text.") < written.index("## Versions") < written.index("## Pictures") < written.index("## Sound")
    )


def test_the_page_shows_the_recorded_runs():
    assert versions.section(versions.stored_runs()) in versions.PAGE.read_text()


def test_the_table_stays_when_the_page_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "stored_runs", lambda: {"oldest": RUN})
    outcome = {
        "model_type": "llava",
        "status": "works",
        "layers": "",
        "decode": "",
        "held": "",
        "prompt": "",
        "reason": "",
    }
    (tmp_path / "llava.json").write_text(json.dumps(outcome))
    table.main(str(tmp_path), str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert "| oldest | 3.11.7 |" in page and "| `llava` | works |" in page
