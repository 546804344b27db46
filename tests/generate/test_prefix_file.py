"""A prefix in a file, and a directory of prefixes."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_and_draft import calibrated, draft, llava, picture
from safetensors.torch import load_file, save_file
from torch import Tensor
from vlms import MODELS, build, prompt

import apack_compile
from apack_compile import PrefixStore

QUESTIONS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def answers(prefix) -> torch.Tensor:
    return prefix.generate(QUESTIONS, max_new_tokens=6, do_sample=False)


def held(prefix) -> list[torch.Tensor]:
    return [x for layer in prefix._cache.packed_layers for x in layer.shared.tensors]


@pytest.mark.parametrize("setting", ({"preset": "lossless"}, {"ratio": 4}), ids=str)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_saved_prefix_answers_as_before(tmp_path, name, setting):
    model, placeholders = build(name)
    apack_compile.optimize(model, compile="none", min_tokens=0, **setting)
    inputs = prompt(name, [[160, 90]], placeholders)
    if "ratio" in setting:
        apack_compile.calibrate(model, prompt(name, [[200, 100, 150]], placeholders, 5))
    prefix = apack_compile.read(model, **inputs)
    expected, path = answers(prefix), tmp_path / "prefix"
    prefix.save(path)
    loaded = apack_compile.load_prefix(model, path)
    assert loaded.length == prefix.length and torch.equal(loaded.input_ids, prefix.input_ids)
    assert torch.equal(answers(loaded), expected) and torch.equal(answers(loaded), expected)
    assert all(map(torch.equal, held(prefix), held(loaded)))
    assert len(held(prefix)) == len(held(loaded)) > 0
    moved = prefix.to("cpu")
    assert moved is not prefix and torch.equal(answers(moved), expected)
    again = tmp_path / "again"
    loaded.save(again)
    one, other = load_file(path), load_file(again)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_saved_prefix_is_read_by_an_equal_model_with_the_saved_plan(tmp_path):
    model, inputs = calibrated(llava(), ratio=4), picture([150, 90])
    prefix = apack_compile.read(model, **inputs)
    prefix.save(tmp_path / "prefix")
    vision = float((inputs["input_ids"] == model.config.image_token_id).float().mean())
    apack_compile.plan_for(model, prefix.length, vision).save(tmp_path / "plan")
    other = llava()
    apack_compile.optimize(other, plan=apack_compile.Plan.load(tmp_path / "plan"), compile="none")
    assert torch.equal(answers(apack_compile.load_prefix(other, tmp_path / "prefix")), answers(prefix))


def test_a_loaded_prefix_is_mapped_not_copied(tmp_path):
    prefix = apack_compile.read(calibrated(llava(), preset="lossless"), **picture([150, 90]))
    prefix.save(tmp_path / "prefix")
    loaded = apack_compile.load_prefix(prefix._model, tmp_path / "prefix")
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    for x in filter(Tensor.numel, held(loaded)):
        assert any(int(begin, 16) <= x.data_ptr() <= int(end, 16) for begin, end in mapped)
    before = (tmp_path / "prefix").read_bytes()
    answers(loaded)
    assert (tmp_path / "prefix").read_bytes() == before
    os.remove(tmp_path / "prefix")
    assert torch.equal(answers(loaded), answers(prefix))


def test_a_file_can_be_read_by_others(tmp_path):
    prefix = apack_compile.read(calibrated(llava(), preset="lossless"), **picture())
    prefix.save(tmp_path / "prefix")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "prefix").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "prefix"]


def rewritten(path: Path, **changes) -> None:
    """The same file with other metadata, or values of the prefix."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values = json.loads(metadata["prefix"]) | changes.pop("values", {})
    save_file(load_file(path), path, metadata | {"prefix": json.dumps(values)} | changes)


def test_what_is_no_prefix_of_the_model_is_refused(tmp_path):
    model, inputs = calibrated(llava(), ratio=4), picture([150, 90])
    path = tmp_path / "prefix"
    apack_compile.read(model, **inputs).save(path)
    whole = path.read_bytes()
    recalibrated = apack_compile.optimize(llava(), ratio=4, compile="none")
    apack_compile.calibrate(recalibrated, picture([90, 200], seed=8))
    half = calibrated(llava().bfloat16(), preset="lossless")
    for other, message in (
        (calibrated(draft(), ratio=4), "read by a model with other weights"),
        (half, "read by a model with 3 layers, 2 KV heads x 8, torch.float32; this one has .* torch.bfloat16"),
        (calibrated(build("gemma3")[0], preset="lossless"), "read by a model with"),
        (
            calibrated(llava(), preset="lossless"),
            "packed with bases that are not this model's; optimize this model with the plan",
        ),
        (recalibrated, "packed with bases that are not this model's"),
        (apack_compile.optimize(llava(), ratio=4, compile="none"), "no calibrated statistics yet"),
    ):
        with pytest.raises(ValueError, match=message):
            apack_compile.load_prefix(other, path)
    with pytest.raises(ValueError, match="is not optimized"):
        apack_compile.load_prefix(llava(), path)
    for end in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            apack_compile.load_prefix(model, path)
    for changes, message in (
        ({"apack_prefix": "2"}, "prefix format '2'; apack-compile .* reads the format 1"),
        ({"prefix": "{"}, "not laid out as prefix format 1"),
        ({"prefix": "{}"}, "not laid out as a prefix: signature is missing"),
        ({"values": {"groups": [{}]}}, "not laid out as a prefix: coordinates is missing"),
    ):
        path.write_bytes(whole)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=message):
            apack_compile.load_prefix(model, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"a safetensors file, but not one that Prefix\.save wrote"):
        apack_compile.load_prefix(model, path)
    with pytest.raises(FileNotFoundError):
        apack_compile.load_prefix(model, tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder"):
        apack_compile.load_prefix(model, tmp_path)


def test_a_store_reads_each_prompt_once(tmp_path):
    model, inputs, other = calibrated(llava(), ratio=4), picture([150, 90]), picture([150, 90], seed=1)
    store = PrefixStore(tmp_path / "store", 10**9)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    first = store.read(model, **inputs)
    assert len(passes) == 1
    again = store.read(model, **inputs)
    assert len(passes) == 1 and all(map(torch.equal, held(first), held(again)))
    store.read(model, **other)
    assert len(passes) == 2 and len(list(store.directory.glob("*.prefix"))) == 2
    torch.testing.assert_close(answers(again), answers(first))
    calibrated(model, preset="lossless")
    store.read(model, **inputs)
    assert len(list(store.directory.glob("*.prefix"))) == 3


def test_a_store_keeps_what_was_used_last(tmp_path):
    model = calibrated(llava(), preset="lossless")
    prompts = [picture([40, 30], seed=seed) for seed in range(4)]
    PrefixStore(tmp_path / "one", 10**9).read(model, **prompts[0])
    size = next((tmp_path / "one").glob("*.prefix")).stat().st_size
    store = PrefixStore(tmp_path / "store", 2 * size + size // 2)
    for given in (prompts[0], prompts[1], prompts[0], prompts[2]):
        store.read(model, **given)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    store.read(model, **prompts[0])
    store.read(model, **prompts[2])
    assert not passes, "the one in between went"
    store.read(model, **prompts[1])
    assert passes and sum(path.stat().st_size for path in store.directory.glob("*.prefix")) <= store.limit_bytes
    small = PrefixStore(tmp_path / "small", 10)
    small.read(model, **prompts[0])
    assert not list(small.directory.glob("*.prefix"))
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=r"limit_bytes=.* must be an integer >= 1"):
            PrefixStore(tmp_path, bad)


READ_OFTEN = """
import sys
from test_prefix_file import *

model = calibrated(llava(), preset="lossless")
store = PrefixStore(sys.argv[1], int(sys.argv[2]))
for seed in (0, 1, 2, 0, 1, 2):
    answers(store.read(model, **picture([40, 30], seed=seed)))
"""


def test_two_processes_share_a_store(tmp_path):
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent / "support")))
    command = [sys.executable, "-P", "-c", READ_OFTEN, str(tmp_path), "120000"]
    workers = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "no half-written file is left"
