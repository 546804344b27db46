"""A file or folder that cannot be used is named with its argument, its value and what to pass instead."""

import os
from pathlib import Path

import pytest
import tiny_llama
import torch
from torch import fx

import apack_compile
from apack_compile import Plan, PrefixStore
from apack_compile.commands.calibrate import show_plan
from apack_compile.passes.base import run_passes


@pytest.fixture(scope="module")
def model():
    return apack_compile.optimize(tiny_llama.llama(), preset="lossless", compile="none", min_tokens=0)


@pytest.fixture(scope="module")
def prefix(model):
    return apack_compile.read(model, input_ids=torch.randint(4, 40, (1, 60)))


@pytest.fixture
def plan(model):
    return apack_compile.plan_for(model, 60)


READERS = {
    "Plan.load": ("path", r"Plan\.save", lambda model, path: Plan.load(path)),
    "load_prefix": ("path", r"Prefix\.save", apack_compile.load_prefix),
    "plan show": ("FILE", "apack-compile calibrate", lambda model, path: show_plan(path)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("case", ["missing", "a folder", "empty", "not readable", "a pipe"])
def test_what_is_read(name, case, model, tmp_path, monkeypatch):
    argument, writer, call = READERS[name]
    path = tmp_path / "file"
    kind, said = {
        "missing": (FileNotFoundError, "does not exist"),
        "a folder": (ValueError, "is a folder"),
        "empty": (ValueError, "not a whole safetensors file"),
        "not readable": (PermissionError, r"cannot be used \(Permission denied\)"),
        "a pipe": (ValueError, "is no file"),
    }[case]
    if case == "a folder":
        path.mkdir()
    elif case == "a pipe":
        os.mkfifo(path)
    elif case != "missing":
        path.touch()
    if case == "not readable":
        # the superuser may read every file
        monkeypatch.setattr(Path, "open", denied)
    argument = "path" if case == "empty" else argument
    with pytest.raises(kind, match=rf"{argument}='{path}'.*{said}.*; pass .*{'' if case == 'empty' else writer}"):
        call(model, path)


def denied(path, *args, **kwargs):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("folder", ["missing", "a file"])
def test_where_something_is_written(folder, model, plan, prefix, tmp_path):
    within = tmp_path / "within"
    kind, said = (FileNotFoundError, "does not exist") if folder == "missing" else (NotADirectoryError, "is a file")
    if folder == "a file":
        within.touch()
    for save, name in ((plan.save, "p"), (prefix.save, "p"), (apack_compile.report(model).save, "p.html")):
        path = within / name
        with pytest.raises(kind, match=rf"path='{path}': the folder '{within}' {said}; pass a file's name"):
            save(path)


def test_a_folder_that_cannot_be_written_to(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("apack_compile.plan.tensor_file.TemporaryDirectory", lambda prefix, dir: denied(dir))
    with pytest.raises(PermissionError, match=rf"path='{tmp_path}/p' cannot be used \(Permission denied\); pass"):
        plan.save(tmp_path / "p")


def test_a_file_where_a_folder_is_wanted(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileExistsError, match=rf"directory='{file}' cannot be used \(File exists\); pass a folder"):
        PrefixStore(file, 1_000)
    with pytest.raises(FileExistsError, match=rf"dump_dir='{file}' cannot be used \(File exists\); pass a folder"):
        run_passes(fx.GraphModule({}, fx.Graph()), (), file)


def test_a_kept_prefix_that_cannot_be_read_is_read_anew(model, tmp_path, monkeypatch):
    store, ids = PrefixStore(tmp_path, 10**9), torch.randint(4, 40, (1, 60))
    store.read(model, input_ids=ids)
    monkeypatch.setattr(Path, "open", denied)
    assert any("could not be used" in note for note in store.read(model, input_ids=ids)._cache.notes)


def test_a_plan_by_its_path_is_refused_with_what_reads_one(model):
    with pytest.raises(ValueError, match=r"plan='/nope' must be a Plan; Plan\.load\(path\) reads one"):
        apack_compile.optimize(model, plan="/nope")
