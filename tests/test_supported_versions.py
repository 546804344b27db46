"""Versions of torch and transformers that are refused at import, and what is said then."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import apack_compile
from apack_compile.supported_versions import SUPPORTED, is_supported, requirement

TORCH, TRANSFORMERS = (requirement(name) for name in SUPPORTED)
ROOT = Path(__file__).parents[1]
PACKAGE = Path(apack_compile.__file__).parent


def import_beside(folder: Path) -> str:
    """What a process says that imports the package where `folder` and the package alone can be imported."""
    (folder / "apack_compile").symlink_to(PACKAGE)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(folder)!r}); import apack_compile"],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ),
    )
    return "" if done.returncode == 0 else done.stderr.splitlines()[-1]


def install(folder: Path, **versions: str) -> None:
    """Write the metadata of packages, and modules that hold nothing else."""
    for name, version in versions.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
        (folder / f"{name}-{version}.dist-info").mkdir()
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("2.10.9", False),
        ("2.11.0a0+nv26.2", True),
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("2.15.0a0", True),
        ("2.15.1.dev20261101+cu130", True),
        ("2.16.0a0+git1234", False),
        ("2.16.0", False),
        ("3.0", False),
        ("unknown", True),
    ],
)
def test_a_pre_release_counts_as_its_release_and_a_local_part_does_not(version, supported):
    assert is_supported("torch", version) == supported


@pytest.mark.parametrize(
    ("version", "supported"),
    [("5.16.2", False), ("5.17.0", True), ("5.24.3", True), ("5.25.0.dev0", False), ("4.57", False)],
)
def test_the_same_of_transformers(version, supported):
    assert is_supported("transformers", version) == supported


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({}, f"apack_compile needs torch, which is not installed: pip install {TORCH}"),
        (
            {"torch": "2.10.0+cpu"},
            f"apack_compile works with {TORCH}; installed is 2.10.0+cpu: pip install {TORCH}",
        ),
        (
            {"torch": "2.13.0", "transformers": "5.25.0.dev0"},
            f"apack_compile works with {TRANSFORMERS}; installed is 5.25.0.dev0: pip install {TRANSFORMERS}",
        ),
        ({"torch": "2.13.0", "transformers": "5.17.0"}, ""),
        ({"torch": "2.13.0"}, ""),
    ],
)
def test_the_import_names_what_is_installed_and_what_to_install(versions, said, tmp_path):
    install(tmp_path, **versions)
    assert import_beside(tmp_path) == (f"ImportError: {said}" if said else "")


def test_a_package_without_metadata_says_its_version_itself(tmp_path):
    (tmp_path / "torch.py").write_text('__version__ = "2.9.1"')
    assert "installed is 2.9.1" in import_beside(tmp_path)


def test_without_transformers_operations_run_and_optimize_says_what_is_missing():
    without = "import sys; sys.modules['transformers'] = None; import apack_compile"
    for use, said in (
        ("apack_compile.kernels", ""),
        (
            "apack_compile.optimize",
            f"ImportError: apack_compile needs transformers, which is not installed: pip install {TRANSFORMERS}",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"{without}; import apack_compile.kernels; {use}"],
            capture_output=True,
            text=True,
        )
        assert (done.stderr.splitlines() or [""])[-1] == said


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="runs in a checkout only")
def test_the_ranges_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {requirement(name).strip('"') for name in SUPPORTED} <= set(project["dependencies"])
