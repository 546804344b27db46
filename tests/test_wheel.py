"""What is built from the sources: wheels with and without a compiler, and the sdist."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77")
if not (ROOT / "setup.py").is_file():
    pytest.skip("runs in a checkout only", allow_module_level=True)
SOURCES = ("apack_compile", "kernels", "passes", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def copy_sources(to: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "_native*"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


def build(what: str, sources: Path, into: Path, **environment: str) -> tuple[Path, str]:
    """The file that the build backend makes (`what`: "wheel" or "sdist"), and what it says."""
    code = f"import sys; from setuptools.build_meta import build_{what} as build; print('built', build(sys.argv[1]))"
    done = run_python(code, sources, into, **environment)
    return into / done.stdout.splitlines()[-1].removeprefix("built "), done.stdout + done.stderr


def run_python(code: str, cwd: Path, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done


def status_of(wheel: Path, folder: Path) -> str:
    """What the package of a wheel says about its compiled operations."""
    zipfile.ZipFile(wheel).extractall(folder)
    code = "from apack_compile.kernels import native; print(native.__file__); print(native.STATUS)"
    file, status = run_python(code, folder, PYTHONPATH=str(folder)).stdout.splitlines()[-2:]
    assert Path(file).is_relative_to(folder)
    return status


def sources_in(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".h", ".cpp"))]


def test_a_wheel_built_without_a_compiler_is_one_for_every_platform_and_says_what_is_lost(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    sources = copy_sources(tmp_path / "sources")
    wheel, said = build("wheel", sources, tmp_path, **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert (
        "Root-Is-Purelib: true"
        in zipfile.ZipFile(wheel).read(f"{wheel.name.split('-py3')[0]}.dist-info/WHEEL").decode()
    )
    assert not sources_in(wheel)
    assert "The package works without them and gives the same results" in said
    assert status_of(wheel, tmp_path / "unpacked") == "not built"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_sdist_gives_a_wheel_for_every_python_of_the_platform(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    sdist, _ = build("sdist", copy_sources(tmp_path / "sources"), tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    wheel, said = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    platform = wheel.name.split("-py3-none-")[1]
    assert platform.startswith(("manylinux_2_28_", "linux_") if sys.platform == "linux" else "macosx_")
    assert platform.startswith("manylinux_2_28_") or "tagged linux_" in said
    assert not sources_in(wheel)
    assert status_of(wheel, tmp_path / "unpacked").startswith("native, ")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_what_only_some_systems_have_keeps_the_manylinux_tag_away() -> None:
    needs = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["beyond_manylinux"]
    assert "libtorch_python.so" in list(needs(Path(torch._C.__file__)))
    assert "libc.so.6" not in list(needs(Path(torch._C.__file__)))
