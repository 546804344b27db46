"""What was run with which versions, part of docs/support.md: `python tests/support/matrix/versions.py COLUMN JUNIT_XML`.

Adds the run that the interpreter made to versions.json, in the place of the column's last one, and writes the page's table anew.
"""

import datetime
import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

RUNS = Path(__file__).with_name("versions.json")
PAGE = Path(__file__).parents[3] / "docs" / "support.md"
TITLE = "## Versions\n"
HEAD = """
The tests that depend on torch and transformers most (`MATRIX_TESTS` in the Makefile), run by `make test-matrix` with
the oldest, the default and the newest versions, each in an environment of its own. "Files": how many of them were run.

| Column | Python | torch | transformers | Run on | Files | Passed | Failed | Skipped |
|---|---|---|---|---|---|---|---|---|
"""
COLUMNS = ("python", "torch", "transformers", "date", "files", "passed", "failed", "skipped")


def run_of(junit: Path) -> dict[str, Any]:
    """The versions of this interpreter, today, and the counts of a run."""
    root = ElementTree.parse(junit).getroot()
    suites = list(root.iter("testsuite"))
    total, errors, failures, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "errors", "failures", "skipped")
    )
    failed = errors + failures
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": datetime.date.today().isoformat(),
        "files": len({case.get("classname") for case in root.iter("testcase")}),
        "passed": total - failed - skipped,
        "failed": failed,
        "skipped": skipped,
    }


def section(runs: dict[str, dict[str, Any]]) -> str:
    """The page's section about versions."""
    rows = (f"| {column} | {' | '.join(str(run[name]) for name in COLUMNS)} |\n" for column, run in runs.items())
    return f"{TITLE}{HEAD}{''.join(rows)}\n"


def with_section(page: str, runs: dict[str, dict[str, Any]]) -> str:
    """A page with this section about versions, before its first other one or in the place of an earlier one."""
    rest = re.sub(rf"^{TITLE}.*?(?=^## )", "", page, flags=re.MULTILINE | re.DOTALL)
    head, mark, sections = rest.partition("## ")
    return head + section(runs) + mark + sections


def stored_runs() -> dict[str, dict[str, Any]]:
    """The last run of each column."""
    return json.loads(RUNS.read_text()) if RUNS.is_file() else {}


def main(column: str, junit: str) -> None:
    """Add a run, and write the page."""
    runs = stored_runs() | {column: run_of(Path(junit))}
    RUNS.write_text(json.dumps(runs, indent=2) + "\n")
    PAGE.write_text(with_section(PAGE.read_text(), runs))


if __name__ == "__main__":
    main(*sys.argv[1:])
