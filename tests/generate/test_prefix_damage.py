"""Files of prefixes whose tensors do not fit one another or the model: refused, because native code trusts what it is given."""

import json
from pathlib import Path

import pytest
import torch
from llava_and_draft import calibrated, llava, picture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vlms import build, prompt

import apack_compile

TOKENS = picture([150, 90])["input_ids"].shape[1]


def written(path: Path, values: dict, tensors: dict) -> Path:
    save_file(tensors, path, {"apack_prefix": "1", "prefix": json.dumps(values)})
    return path


def saved(path: Path, model, inputs: dict) -> tuple[dict, dict]:
    """Values and tensors of the prefix of a prompt."""
    apack_compile.read(model, **inputs).save(path)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["prefix"]), load_file(path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    model = calibrated(llava(), ratio=4)
    return model, *saved(tmp_path_factory.mktemp("prefix") / "prefix", model, picture([150, 90]))


def cut(dim: int):
    return lambda x: x.narrow(dim, 0, 1).clone()


def wider(dim: int):
    return lambda x: torch.cat([x, x.narrow(dim, 0, 1)], dim)


def changed(x: torch.Tensor, slot: tuple, value: int) -> torch.Tensor:
    x = x.clone()
    x[slot] = value
    return x


CODES = [f"prefix_{kind}_{stream}_codes" for kind in ("vision", "text") for stream in ("key", "value")]
DAMAGED = [
    *((name, change) for name in CODES for change in (cut(2), wider(2), wider(0), wider(1), wider(3))),
    *((name, lambda x: x.flatten()) for name in CODES),
    *((name, lambda x: x.short()) for name in CODES),
    *(
        (name.replace("codes", "scale"), lambda x: x.new_zeros(0) if x.numel() else x.new_zeros(1, 1, 9))
        for name in CODES
    ),
    *(
        (name, change)
        for name in ("first_key", "first_value")
        for change in (cut(1), cut(2), cut(3), wider(0), torch.Tensor.double)
    ),
    *(
        (name, change)
        for name in ("tail_key", "tail_value")
        for change in (cut(1), wider(3), cut(3), wider(0), torch.Tensor.double)
    ),
    ("first_positions", wider(1)),
    ("first_positions", torch.Tensor.long),
    ("first_positions", lambda x: changed(x, (0, 0), 10**6)),
    ("prefix_text_positions", cut(1)),
    ("prefix_text_positions", lambda x: x[0]),
    ("prefix_text_positions", lambda x: changed(x, (0, 0), 10**6)),
    ("prefix_text_positions", lambda x: changed(x, (0, 0), -2)),
    ("prefix_vision_rotations", lambda x: x[:, :0].clone()),
    ("prefix_vision_rotations", cut(3)),
    ("prefix_vision_rotations", torch.Tensor.half),
    ("cursor", lambda x: x[:2].clone()),
    ("cursor", torch.Tensor.int),
]


@pytest.mark.parametrize("i", range(len(DAMAGED)), ids=lambda i: f"{DAMAGED[i][0]}-{i}")
def test_a_damaged_tensor_is_named(tmp_path, packed, i):
    model, values, tensors = packed
    part, change = DAMAGED[i]
    name = next(x for x in tensors if x.endswith(f".{part}"))
    path = written(tmp_path / "prefix", values, tensors | {name: change(tensors[name])})
    with pytest.raises(ValueError, match=rf"^path='{path}': layer 0: layers\.0\.\w+.* must be") as caught:
        apack_compile.load_prefix(model, path)
    # the first tokens say how many heads there are, and positions how many slots
    assert part in str(caught.value) or part in ("first_key", "first_value", "prefix_text_positions")


@pytest.mark.parametrize(
    "cursor",
    ([10**6, None, None], [None, 10**6, None], [None, 0, None], [None, None, -1], [None, None, 10**6]),
    ids=str,
)
def test_a_cursor_out_of_bounds_is_refused(tmp_path, packed, cursor):
    model, values, tensors = packed
    name = next(x for x in tensors if x.endswith(".cursor"))
    new = torch.tensor([x if given is None else given for x, given in zip(tensors[name].tolist(), cursor, strict=True)])
    with pytest.raises(ValueError, match=r"layer \d: cursor .* must"):
        apack_compile.load_prefix(model, written(tmp_path / "prefix", values, tensors | {name: new}))


@pytest.mark.parametrize(
    ("where", "field", "value", "message"),
    (
        ("group", "capacity", "9", "capacity is '9', not of type int"),
        ("group", "capacity", True, "capacity is True, not of type int"),
        ("group", "capacity", 10**12, "capacity=1000000000000 must be"),
        ("group", "capacity", 1, "capacity=1 must be"),
        ("group", "prefix", 3, "prefix=3 must be"),
        ("group", "prefix", None, "prefix=None must be"),
        ("group", "assigned", 10**6, "assigned"),
        ("group", "floor", -1, "assigned, laid_out and floor"),
        ("group", "laid_out", [1], "laid_out .* must be two integers"),
        ("group", "laid_out", [1.5, 2], "laid_out is 1.5, not of type int"),
        ("group", "coordinates", {}, "coordinates: missing"),
        ("group", "coordinates", {"known": "x"}, "coordinates must name known and shift"),
        ("group", "coordinates", {"known": "x", "shift": "y"}, "tensor x is missing"),
        ("group", "coordinates", {"known": "input_ids", "shift": "input_ids"}, "input_ids is torch.int64"),
        ("group", "layers", [], r"layers \[\] are layers \[0, 1, 2\] here"),
        ("group", "layers", [3], "layers is 3, not of type dict"),
        ("layer", "origin", 0, "cursor .* must begin at 0"),
        ("layer", "layer", 7, "layers .* are layers"),
        ("layer", "layout", [1, 2], "layout: 2 integers"),
        ("layer", "tensors", ["x"], "tensor x is missing"),
        ("layer", "tensors", ["input_ids"], "1 tensors must be"),
        ("layout", 1, 7, "block and interleaved pairs"),
        ("layout", 3, 0, "segments coarse"),
        ("layout", 4, 9, "bands .* must be"),
        ("layout", 4, -9, "bands .* must be"),
    ),
)
def test_a_damaged_number_is_refused(tmp_path, packed, where, field, value, message):
    model, values, tensors = packed
    values = json.loads(json.dumps(values))
    group = values["groups"][0]
    {"group": group, "layer": group["layers"][0], "layout": group["layers"][0]["layout"]}[where][field] = value
    with pytest.raises(ValueError, match=message):
        apack_compile.load_prefix(model, written(tmp_path / "prefix", values, tensors))


def test_ids_and_rope_deltas_are_checked(tmp_path, packed):
    model, values, tensors = packed
    for more, message in (
        ({"input_ids": torch.zeros(1, 3)}, "input_ids is torch.float32"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, r"input_ids is torch.int64 \[2, 3\]"),
        ({"rope_deltas.model.x": torch.zeros(1, 1)}, "rope_deltas of .*model.x"),
    ):
        with pytest.raises(ValueError, match=message):
            apack_compile.load_prefix(model, written(tmp_path / "prefix", values, tensors | more))
    left = {name: x for name, x in tensors.items() if name != "input_ids"}
    with pytest.raises(ValueError, match="tensor input_ids is missing"):
        apack_compile.load_prefix(model, written(tmp_path / "prefix", values, left))


@pytest.mark.parametrize("part", ("codes", "positions"))
def test_layers_with_a_window_are_checked(tmp_path, part):
    model, placeholders = build("gemma3")
    calibrated(model, preset="lossless")
    values, tensors = saved(tmp_path / "prefix", model, prompt("gemma3", [[160, 90]], placeholders))
    windowed = next(group for group in values["groups"] if group["window"] is not None)
    name = next(
        x
        for x in windowed["layers"][0]["tensors"]
        if x.endswith(f".text_key_{part}" if part == "codes" else ".text_positions")
    )
    dim = 2 if part == "codes" else 1
    path = written(tmp_path / "prefix", values, tensors | {name: cut(dim)(tensors[name])})
    with pytest.raises(ValueError, match=r"layer \d: .* must be"):
        apack_compile.load_prefix(model, path)


def test_a_model_that_is_not_optimized_any_more_is_named():
    model = calibrated(llava(), preset="lossless")
    prefix = apack_compile.read(model, **picture())
    apack_compile.restore(model)
    with pytest.raises(ValueError, match=r"to: this .* is not optimized any more"):
        prefix.to("cpu")


@pytest.mark.parametrize("name", ("llava", "gemma3", "qwen2_5_vl"))
def test_coarse_tokens_are_loaded_as_they_were(tmp_path, name):
    model, placeholders = build(name)
    apack_compile.optimize(model, compile="none", min_tokens=0, ratio=5.2)
    apack_compile.calibrate(model, prompt(name, [[200, 100, 150]], placeholders, 5))
    plan = apack_compile.plan_for(model, 4000)
    assert plan.coarse is not None
    apack_compile.optimize(model, compile="none", plan=plan)
    prefix = apack_compile.read(model, **prompt(name, [[160, 90]], placeholders))
    prefix.save(tmp_path / "prefix")
    asked = torch.tensor([[5, 6, 7], [8, 9, 10]])
    loaded = apack_compile.load_prefix(model, tmp_path / "prefix")
    both = [x.generate(asked, max_new_tokens=6, do_sample=False) for x in (prefix, loaded)]
    assert torch.equal(*both)
