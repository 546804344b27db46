"""The published presets against plain implementations of their papers, row by row."""

import pytest
import torch
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
    compared = 0
    for row in range(len(rows)):
        real = inputs["attention_mask"][row].bool()
        method = preset.plain(model)
        expected = method.prefill(embeddings[row, real], inputs["input_ids"][row, real] == IMAGE)[-1]
        for step in range(STEPS):
            error = (got[row, step].double() - expected).abs().max() / expected.abs().max()
            assert error < 2e-3, (row, step, float(error))
            compared += 1
            expected = method.decode(model.get_input_embeddings()(new[row, step])[None])[-1]
            if method.undecided:
                break
    assert compared >= preset.steps * len(rows)
