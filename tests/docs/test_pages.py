"""What every page keeps to: lengths, links, and figures that are those of the result files."""

import dataclasses
import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch

import apack_compile.kernels  # noqa: F401
from apack_compile import AttentionPackConfig
from apack_compile.plan.presets import PRESETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [
    path
    for folder in ("apack_compile", "passes", "kernels", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp")
]
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="runs in a checkout only")


def prose(page: Path) -> list[str]:
    """Lines of a page that are neither table, code, picture nor heading."""
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for line in outside.splitlines() if not line.startswith(("|", "    ", "![", "#"))]


def of(name: str) -> list[dict]:
    """Rows of a results file."""
    return json.loads((RESULTS / name).read_text())["rows"]


def the_one(rows: list[dict], **wanted: object) -> dict:
    """The row with these values."""
    (row,) = (row for row in rows if all(row.get(name) == value for name, value in wanted.items()))
    return row


def test_the_readme_fits_in_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_ends_at_120_columns(page):
    assert [line for line in prose(page) if len(line) > 120] == []


def test_no_file_has_what_a_merge_left_open():
    mark = re.compile(r"^\s*(?:<{7} |>{7} |={7}$)", flags=re.MULTILINE)
    assert [path for path in (*PAGES, *CODE) if mark.search(path.read_text())] == []


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_outside_of_the_site_lead_somewhere(page):
    links = re.findall(r"""(?:\]\(|src=")(?!https?://|#)([^)#"]+)""", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_every_page_that_is_named_exists():
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in (*PAGES, *CODE, ROOT / "Makefile")
        for name in re.findall(r"(?<![\w/])docs/[\w/]+\.md", path.read_text())
    }
    assert named
    assert sorted((path, name) for path, name in named if not (ROOT / name).is_file()) == []


def test_every_file_that_a_page_names_exists():
    folders = "tests|benchmarks|apack_compile|kernels|passes"
    named = {
        (str(page.relative_to(ROOT)), name)
        for page in PAGES
        for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", page.read_text())
        if "." not in name or name.endswith((".py", ".h", ".cpp", ".json"))
    }
    assert named
    assert sorted((page, name) for page, name in named if not (ROOT / name).exists()) == []


def test_the_files_to_open_for_a_change_exist():
    named = set(re.findall(r"`(\w+\.(?:py|h|cpp))`", (ROOT / "docs" / "contributing.md").read_text()))
    assert len(named) > 5
    assert sorted(named - {path.name for path in CODE}) == []


@pytest.mark.parametrize("options", [AttentionPackConfig, *(p for name, p in PRESETS.items() if name != "lossless")])
def test_the_reference_has_every_option_and_its_default(options):
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    section = page.partition(f"::: apack_compile.{options.__name__}\n")[2].partition(":::")[0]
    shown = dict(re.findall(r"^\| `(\w+)`(?:, `\w+`)* \| (.*?) \|", section, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)))) == set(fields)
    plain = {name: value for name, value in fields.items() if isinstance(value, (int, float)) and name in shown}
    assert {name: shown[name] for name in plain} == {
        name: f"{value:g}" if value is not False else "False" for name, value in plain.items()
    }


def test_the_reference_has_every_argument_of_every_operation():
    page = (ROOT / "docs" / "reference" / "operations.md").read_text()
    shown = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    for name in re.findall(r"^    apack::(\w+)\(", page, re.MULTILINE):
        schema = getattr(torch.ops.apack, name).default._schema
        assert {argument.name for argument in schema.arguments} <= shown | {"block"}
        whole = " ".join(re.search(rf"^    (apack::{name}\(.*?)\n(?!     )", page, re.DOTALL | re.MULTILINE)[1].split())
        assert "... as attend" in whole or whole == str(schema)


def test_the_readme_has_the_figures_of_the_result_files():
    page = (ROOT / "README.md").read_text()
    sentences = " ".join(page.split())
    text = [row for row in of("quality-text.json") if row["bench"] == "text" and row["tokens"] == 6144]
    cached = {"shape": "SmolLM2-135M", "tokens": 8192, "dtype": "float32"}
    speeds = {ratio: the_one(of("attend-cpu.json"), **cached, plan=f"ratio={ratio}") for ratio in (4, 8)}
    for ratio in (4, 8, 16):
        row = the_one(text, system="apack-compile", setting=f"ratio {ratio}")
        speed = f"{speeds[ratio]['speedup_vs_dense']:.1f}" if ratio in speeds else "not measured"
        size, smaller, kl = row["sequence_bytes"] / 1e6, row["held_ratio"], row["kl"]
        assert f"| `ratio={ratio}` | {size:.1f} MB | {smaller:.2f} | {kl:.2g} | {speed} |" in page
        if ratio in speeds:
            bases = the_one(of("bases.json"), model="SmolLM2-135M, text", ratio=float(ratio))
            assert f"{bases['basis_bytes'] / 1e6:.1f} MB at ratio {ratio}" in sentences
    types = (ROOT / "docs" / "support.md").read_text()
    count, works = re.search(r"^(\d+) types: (\d+) works", types, re.MULTILINE).groups()
    assert f"Of {count} image-text-to-text model types, {works} work, and one works with some layers dense" in sentences
    dense = the_one(text, system="dense", setting="model in bfloat16")
    assert f"| {dense['sequence_bytes'] / 1e6:.1f} MB | 1 | {dense['kl']:.4f} |" in page
    for name, said in (
        ("decode-cpu.json", "1.65 times as fast (1 request of 2,048 tokens)"),
        ("decode-cpu-8000-tokens.json", "3.42 times (1 of 8,000)"),
        ("decode-cpu-batch-16.json", "7.09 times (16 of 2,048)"),
        ("decode-not-compiled-cpu.json", "0.94 of the dense speed (1 of 2,048)"),
    ):
        measured = the_one(of(name), shape="SmolLM2-135M, real")["speedup_vs_dense"]
        assert said in sentences and said.startswith(f"{measured:.2f}")


def test_the_readme_and_the_performance_page_have_the_throughput_of_the_result_file():
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/performance.md"))
    for name in (
        "throughput-cpu.json",
        "throughput-cpu-one-thread.json",
        "throughput-cpu-demo-vlm.json",
        "throughput-cpu-bfloat16.json",
    ):
        for row in of(name):
            packed, dense = row["packed_tokens_per_second"], row["dense_tokens_per_second"]
            assert row["throughput_at_equal_bytes"] == pytest.approx(packed / dense)
            start = f"| `{row['plan']}` | {row['dense_batch']} "
            gains = f"{row['throughput_at_equal_bytes']:.2f} | {row['throughput_at_equal_batch']:.2f} |"
            pattern = rf"^{re.escape(start)}.*\| {packed:.1f} \| {re.escape(gains)}$"
            assert re.search(pattern, page, re.MULTILINE)
            assert (
                f"| `{row['plan']}` | {row['packed_batch']} | {packed:.0f} |" in readme or name != "throughput-cpu.json"
            )


def test_the_performance_page_has_what_the_paper_preset_gives_at_equal_bytes():
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    for name in ("throughput-cpu-attentionpack.json", "throughput-cpu-demo-vlm-attentionpack.json"):
        (row,) = of(name)
        packed, gain = row["packed_tokens_per_second"], row["throughput_at_equal_bytes"]
        assert f"{row['packed_batch']} requests, {packed:.1f} tokens a second, {gain:.2f} times" in page


def test_the_performance_page_has_every_row_of_the_bases_and_none_is_over_the_limit():
    page = (ROOT / "docs" / "performance.md").read_text()
    for row in of("bases.json"):
        share = f"{row['basis_bytes'] / 1e6:.1f} MB | {row['share']:.1%} |".replace("%", " %")
        assert f"| {row['model']} | {row['ratio']:g} | {row['groups']} | {row['dtype']} | {share}" in page
        assert row["share"] <= 0.03


def test_the_quality_guide_has_the_figures_of_both_ways_to_calibrate():
    page = (ROOT / "docs" / "guides" / "quality.md").read_text()
    for row in of("calibration-quality.json"):
        ways = " | ".join(f"{row[f'kl_{way}']:.4f}" for way in ("calibrate", "first_request", "after_another"))
        assert re.search(rf"^\| {row['prompts']}.* \| {row['ratio']:g} \| {re.escape(ways)} \|$", page, re.MULTILINE)


def test_the_performance_page_has_what_calibration_and_a_first_request_cost():
    page = (ROOT / "docs" / "performance.md").read_text()
    for row in of("calibration-cpu.json"):
        start = f"| {row['shape']} | {row['tokens']:,} | "
        figures = f" | {row['inputs']} | {row['peak_mb']:,.0f} MiB | {row['prefills_an_input']:.2f} |"
        assert re.search(rf"^{re.escape(start)}`?{row['what']}.*{re.escape(figures)}", page, re.MULTILINE), row


def attend_speeds(rows: list[dict], shape: str, plan: str) -> list[float]:
    """Dense over packed time of a shape and a plan, long caches first, float32 before bfloat16."""
    return [
        the_one(rows, shape=shape, plan=plan, tokens=tokens, dtype=dtype)["speedup_vs_dense"]
        for tokens in (8192, 512)
        for dtype in ("float32", "bfloat16")
    ]


def test_the_performance_page_has_the_figures_of_an_intel_processor():
    page, rows = (ROOT / "docs" / "performance.md").read_text(), of("attend-cpu-xeon-amx.json")
    for row in (row for row in rows if row["tokens"] == 8192 and row["dtype"] == "float32"):
        speeds = attend_speeds(rows, row["shape"], row["plan"])
        speeds.append(row["avx512_vnni_ms_first_decile"] / row["avx512_amx_ms_first_decile"])
        assert f"| {row['shape']} | `{row['plan']}` | {' | '.join(f'{speed:.2f}' for speed in speeds)} |" in page
    for plan in ("ratio=4", "ratio=8"):
        alone = [row["speedup_vs_dense"] for row in of("attend-cpu-xeon-quick.json") if row["plan"] == plan]
        assert f"{min(alone):.2f} to {max(alone):.2f} at `{plan}`" in page.replace("\n", " ")
    for row in (*of("decode-cpu-xeon.json"), *of("decode-cpu-xeon-8000-tokens.json")):
        length = f"{row['tokens']:,}" + (f", batch {row['batch']}" if row["batch"] > 1 else "")
        speeds = f"{row['speedup_vs_dense']:.2f} | {row['speedup_vs_shared_heads']:.2f}"
        tokens = " | ".join(f"{row[f'{way}_tokens_per_second']:.1f}" for way in ("dense", "shared_heads", "packed"))
        assert f"| {length} | {row['ratio']:.1f} | {speeds} | {tokens} |" in page
    shared = of("shared-prefix-cpu-xeon.json")
    for shape in {row["shape"] for row in shared}:
        found = [the_one(shared, shape=shape, plan=plan) for plan in ("ratio=4", "ratio=8", "lossless")]
        times = " | ".join(f"{row['shared_prefix_step_ratio']:.2f}" for row in found)
        assert f"| {shape} | {times} |" in page


def test_the_performance_page_has_what_branches_of_a_prefix_cost():
    page = (ROOT / "docs" / "performance.md").read_text()
    for row in (*of("shared-prefix-cpu.json"), *of("shared-prefix-cpu-32-groups.json")):
        plan = f"`{row['plan']}`" if "=" in row["plan"] else f'`preset="{row["plan"]}"`'
        ratios = f"{row['shared_prefix_step_ratio']:.2f} | {row['bytes_ratio']:.2f}"
        times = f"{row['copies_ms']:.1f} ms | {row['shared_ms']:.1f} ms"
        assert f"| {row['shape']} | {plan} | {row['dtype']} | {row['groups']} | {times} | {ratios} |" in page


def test_the_performance_page_has_the_figures_of_the_result_files():
    page, rows = (ROOT / "docs" / "performance.md").read_text(), of("attend-cpu.json")
    for row in (row for row in rows if row["tokens"] == 8192 and row["dtype"] == "float32"):
        speeds = attend_speeds(rows, row["shape"], row["plan"])
        name = f"`{row['plan']}`" if "=" in row["plan"] else row["plan"].replace("attentionpack", "`attentionpack`")
        cells = " | ".join(f"{speed:.2f}" for speed in speeds)
        assert f"| {row['shape']} | {name} | {row['groups']} | {cells} |" in page
    for shape, ratio in product({row["shape"] for row in rows}, (4, 8)):
        line = re.search(rf"^\| {shape} \| 4 (\|.*)\n\| \| 8 (\|.*)", page, re.MULTILINE)[1 if ratio == 4 else 2]
        shown = {2**i: float(cell.strip(" *")) for i, cell in enumerate(line.split("|")[1:-1]) if cell.strip()}
        groups = [r for r in of("attend-cpu-head-groups.json") if r["shape"] == shape and r["plan"] == f"ratio={ratio}"]
        measured = {row["groups"]: row["speedup_vs_dense"] for row in groups if row["tokens"] == 8192}
        assert shown == {count: round(measured[count], 2) for count in shown}
    for name, length, compiled in (
        ("decode-cpu.json", "2,048", "yes"),
        ("decode-cpu-batch-16.json", "2,048, batch 16", "yes"),
        ("decode-cpu-8000-tokens.json", "8,000", "yes"),
        ("decode-not-compiled-cpu.json", "2,048", "no"),
    ):
        row = the_one(of(name), shape="SmolLM2-135M, real")
        shown = f"| SmolLM2-135M | {length} | {compiled} | {row['ratio']:.1f} | {row['speedup_vs_dense']:.2f} |"
        if compiled == "yes":
            shown += f" {row['speedup_vs_shared_heads']:.2f} | {row['dense_tokens_per_second']:.1f} |"
        assert shown in page


def test_the_performance_page_has_how_fast_linear_layers_are():
    page, rows = (ROOT / "docs" / "performance.md").read_text(), of("linear-cpu.json")
    for name, inputs, outputs in {(row["layer"], row["inputs"], row["outputs"]) for row in rows}:
        speeds = [row["speedup"] for row in rows if row["layer"] == name]
        cells = " | ".join(f"{speed:.2f}" for speed in speeds)
        assert f"| {name} | {inputs:,} x {outputs:,} | {cells} |" in page
    assert min(row["speedup"] for row in rows) > 1


def test_the_guide_to_quality_has_the_figures_of_the_result_files():
    page = (ROOT / "docs" / "guides" / "quality.md").read_text()
    text = [row for row in of("quality-text.json") if row["bench"] == "text"]
    pictures = [row for row in of("quality-vision.json") if row["bench"] == "vision" and row["pictures"] == 16]
    shown: dict[int, list[list[float]]] = {}
    for ratio, cells in re.findall(r"^\| `ratio=(\d+)` \| ([\d.]+ \|.*) \|$", page, re.MULTILINE):
        shown.setdefault(int(ratio), []).append([float(cell.strip(" %")) for cell in cells.split("|")])

    def figures(rows: list[dict], ratio: int, share: str, **wanted: object) -> list[float]:
        row = the_one(rows, system="apack-compile", setting=f"ratio {ratio}", **wanted)
        return [row["held_ratio"], row["kl"], 100 * row[share]]

    for ratio in (2, 4, 6, 8, 16):
        by_text = [figure for tokens in (6144, 2048) for figure in figures(text, ratio, "top1_equal", tokens=tokens)]
        assert shown[ratio][0] == pytest.approx(by_text, rel=0.05, abs=5e-6)
    for ratio in (4, 6, 8, 16):
        assert shown[ratio][1][:3] == pytest.approx(figures(pictures, ratio, "answers_equal"), rel=0.05)
    for ratio in (4, 6, 8):
        demo = json.loads((RESULTS / f"demo-16-pictures-ratio-{ratio}.json").read_text())
        sizes = f"{demo['dense_bytes'] / 1e6:.1f} MB | {demo['sequence_bytes'] / 1e6:.1f} MB"
        counts = (demo[name] * demo["questions"] for name in ("answers_equal", "accuracy_dense", "accuracy_packed"))
        answers = " | ".join(f"{count:.0f} of {demo['questions']}" for count in counts)
        assert f"| `--ratio {ratio}` | {demo['ratio']:.2f} | {sizes} | {answers} |" in page


def test_the_constants_to_change_exist():
    page = (ROOT / "docs" / "contributing.md").read_text()
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", page))
    assert len(named) > 3
    code = " ".join(path.read_text() for path in CODE if path.suffix != ".json")
    assert sorted(name for name in named if not re.search(rf"^\s*{name}\b.*=", code, re.MULTILINE)) == []
