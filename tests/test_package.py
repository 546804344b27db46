"""The installed package: what importing it costs, its names, its entry points."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
in_checkout = pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="runs in a checkout only")


def run_python(code: str, cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=dict(os.environ))


def test_importing_the_package_imports_no_optional_or_heavy_module(tmp_path: Path) -> None:
    code = """
import sys, apack_compile
heavy = ("triton", "torchao", "matplotlib", "rich", "typer", "PIL", "gguf", "lm_eval", "datasets", "ray")
print([name for name in sys.modules if name.split(".")[0] in heavy
       or name.startswith("transformers.models.") and name.split(".")[-1].startswith("modeling_")])
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_none_of_its_folders(tmp_path: Path) -> None:
    code = "import sys, apack_compile; print(*sorted(n for n in sys.modules if n.startswith('apack_compile.')))"
    assert run_python(code, tmp_path).stdout.split() == ["apack_compile.supported_versions", "apack_compile.version"]


def test_the_backend_is_found_by_name_in_a_process_that_never_imported_us(tmp_path: Path) -> None:
    code = "import sys, torch; print('attentionpack' in torch.compiler.list_backends(), 'apack_compile' in sys.modules)"
    done = run_python(code, tmp_path)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_the_console_script_is_an_entry_point() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="apack-compile")
    assert callable(script.load())


def test_the_package_is_typed_and_holds_the_demo_weights() -> None:
    import apack_compile

    folder = Path(apack_compile.__file__).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "demo" / "data" / "vision_and_projector.safetensors").stat().st_size > 3_000_000


def test_the_version_is_the_installed_one() -> None:
    import apack_compile

    assert importlib.metadata.version("apack-compile") == apack_compile.__version__


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_the_bare_name_does_not_find_ours_outside_the_checkout(name: str, tmp_path: Path) -> None:
    done = run_python(f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin)", tmp_path)
    origin = done.stdout.strip()
    assert origin == "None" or "apack_compile" not in Path(origin).read_text()


@in_checkout
@pytest.mark.parametrize(
    ("code", "error"), [("import passes", "ImportError"), ("import kernels; kernels.attend", "AttributeError")]
)
def test_the_bare_name_is_refused_in_the_checkout_with_a_clear_message(code: str, error: str) -> None:
    done = run_python(code, ROOT)
    assert done.returncode == 1
    name = code.split(";")[0].split()[1]
    assert done.stderr.splitlines()[-1].startswith(f"{error}: this folder is apack_compile.{name}")


@in_checkout
def test_transformers_can_be_imported_where_the_checkout_is_on_the_path() -> None:
    code = """
import transformers.modeling_utils, apack_compile.kernels
from transformers.utils import is_kernels_available
print(is_kernels_available(), hasattr(apack_compile.kernels, "ops"))
"""
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    if importlib.util.find_spec("kernels") is None:
        assert done.stdout.split() == ["False", "True"]


@in_checkout
def test_every_folder_with_code_is_listed_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for top, prefix in (
        ("apack_compile", "apack_compile"),
        ("passes", "apack_compile.passes"),
        ("kernels", "apack_compile.kernels"),
    ):
        for file in (ROOT / top).rglob("*.py"):
            inside = file.parent.relative_to(ROOT / top).parts
            found.add(".".join((prefix, *inside)))
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"
    assert found == set(settings["packages"])


def test_transformers_hub_kernel_import_works_next_to_us(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        pytest.skip("the PyPI package kernels is not installed")
    code = "import apack_compile.kernels; from kernels import get_kernel; import transformers.integrations.hub_kernels"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
