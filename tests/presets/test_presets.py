"""The published presets against plain implementations of their papers, row by row."""

import json

import pytest
import torch
from llava_and_draft import greedy, llava, picture
from preset_rows import PRESET_ROWS
from vlms import IMAGE, build, prompt

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.plan.presets import PRESETS

STEPS = 14
BATCHES = {
    "one": [[5, 9, 7, 3, 6, 8]],
    "four-padded": [[5, 9, 7, 3, 6, 8], [12, 4, 1, 2, 8], [3, 6, 8, 9, 5, 4], [2, 30, 9, 7, 1, 4]],
}


def test_every_preset_has_a_row():
    assert list(PRESET_ROWS) == list(PRESETS)


def test_the_options_of_every_preset_are_imported_from_the_package():
    for name, options in PRESETS.items():
        assert getattr(apack_compile, options.__name__) is options and options().name == name
    assert not hasattr(apack_compile, "OtherOptions")


@pytest.mark.parametrize("name", PRESET_ROWS)
def test_a_configuration_takes_the_options_of_its_preset_alone(name):
    options = PRESET_ROWS[name].config.get("options", PRESETS[name]())
    config = AttentionPackConfig(preset=name, options=options)
    assert config.preset_options == options
    assert AttentionPackConfig.from_json(config.to_json()) == config
    assert AttentionPackConfig(preset=name).preset_options == PRESETS[name]()
    with pytest.raises(ValueError, match=r"options=.* are those of a preset; pass preset too"):
        AttentionPackConfig(options=options)
    other = next(preset for preset in PRESETS.values() if preset.name != name)
    with pytest.raises(ValueError, match=f"options=.* must be {PRESETS[name].__name__} with preset='{name}'"):
        AttentionPackConfig(preset=name, options=other())
    with pytest.raises(ValueError, match="options is an object with"):
        AttentionPackConfig.from_json(json.dumps({"preset": name, "options": {"unknown": 1}}))


def test_options_are_given_once():
    AttentionPackConfig(preset="a-vl", a_vl=apack_compile.AVLOptions(core=0.2))
    with pytest.raises(ValueError, match="options and a_vl exclude each other"):
        AttentionPackConfig(preset="a-vl", a_vl=apack_compile.AVLOptions(core=0.2), options=apack_compile.AVLOptions())


@pytest.mark.parametrize("name", PRESET_ROWS)
def test_a_saved_plan_gives_the_same_tokens(name, tmp_path):
    config = AttentionPackConfig(preset=name, compile="none", **PRESET_ROWS[name].config)
    model, inputs = apack_compile.optimize(llava(), config), picture([60, 40], [30, 50])
    expected = greedy(model, inputs)
    apack_compile.plan_for(model, 100, 0.3).save(tmp_path / "plan")
    other = apack_compile.optimize(llava(), plan=apack_compile.Plan.load(tmp_path / "plan"), compile="none")
    assert torch.equal(greedy(other, inputs), expected)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("compile", ["none", "eager"])
@pytest.mark.parametrize("name", PRESET_ROWS)
def test_a_preset_is_its_paper_in_every_row(name, compile, rows):
    model, placeholders = build("llava")
    model = model.double()
    inputs = prompt("llava", rows, placeholders)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        embeddings = model(**inputs, output_hidden_states=True).hidden_states[0]
    preset = PRESET_ROWS[name]
    apack_compile.optimize(model, AttentionPackConfig(preset=name, compile=compile, **preset.config))
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = out.sequences[:, -STEPS:]
    got = torch.stack(out.logits, 1)
    errors = []
    # fitted bases are float16: which way their numbers round is chance
    most = 3e-3 if name == "attentionpack" else 2e-3
    for row in range(len(rows)):
        real = inputs["attention_mask"][row].bool()
        method = preset.plain(model)
        expected = method.prefill(embeddings[row, real], inputs["input_ids"][row, real] == IMAGE)[-1]
        for step in range(STEPS):
            error = (got[row, step].double() - expected).abs().max() / expected.abs().max()
            assert error < most, (row, step, float(error))
            errors.append(float(error))
            expected = method.decode(model.get_input_embeddings()(new[row, step])[None])[-1]
            if method.undecided:
                break
    assert len(errors) >= preset.steps * len(rows)
    assert sum(errors) / len(errors) < 1.2e-3
