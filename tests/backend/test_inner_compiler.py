"""Where Inductor finds no C++ compiler, graphs run eagerly, and that is said."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config

import apack_compile
from apack_compile.backend.inner_compiler import resolve_compile


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def executable(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("there", "chosen"), [("g++-13", "inductor"), ("clang++", "eager"), (None, "eager")])
def test_auto_is_inductor_where_there_is_the_compiler_that_inductor_calls(there, chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if there is not None:
        executable(tmp_path, there)
    with config.patch({"cpp.cxx": (None, "g++-13")}):
        inner, reason = resolve_compile("auto", "cpu")
        assert inner == chosen
        assert ("g++-13" if chosen == "inductor" else "runs eagerly") in reason
        assert resolve_compile("auto", "cuda")[0] == "inductor"
        assert resolve_compile("inductor", "cpu") == ("inductor", "as asked")
        assert resolve_compile("none", "cpu")[0] is None


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
def test_a_graph_runs_eagerly_without_a_compiler_and_the_log_says_why(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    log = apack_compile.GraphLog()
    options = {"log": log}
    backend = apack_compile.backend.backend.make_backend(**options)
    step = torch.compile(lambda x: x.sin() + 1, backend=backend, mode=mode)
    x = torch.randn(5)
    with pytest.warns(UserWarning, match="neither an accelerator nor a C\\+\\+ compiler") as warned:
        assert torch.equal(step(x), x.sin() + 1)
    assert (f"mode={mode!r} is ignored" in str(warned[0].message)) == (mode is not None)
    (compiler,) = apack_compile.report(log).compilers
    assert compiler.startswith("eager (auto: there is neither an accelerator nor a C++ compiler")
    assert compiler in str(apack_compile.report(log))


def test_inductor_that_was_asked_for_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: asked.append(gm) or gm.forward)
    torch.compile(lambda x: x + 1, backend="attentionpack", options={"inner": "inductor"})(torch.ones(2))
    assert len(asked) == 1


def test_a_user_is_warned_once(tmp_path):
    code = (
        "import torch\n"
        "for n in range(3):\n"
        "    f = torch.compile(lambda x: x * n, backend='attentionpack')\n"
        "    assert torch.equal(f(torch.ones(2)), torch.ones(2) * n)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert "Install g++ or clang++, or set CXX" in done.stderr
