"""How many head groups share bases: what is chosen, and what becomes of a calibration for another number."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.plan import largest_ratio
from apack_compile.plan_choice import LEAST_SPEED, fewest_groups, typical_plan
from apack_compile.time_model import CPU, H200, Device, Load, predicted_speedup

SHAPES = {
    "Qwen2.5-VL-7B": (28, 4, 128),
    "LLaVA-1.5-7B": (32, 32, 128),
    "SmolLM2-135M": (9, 3, 64),
    "Gemma3-4B": (8, 4, 256),
}


def speed(shape: tuple[int, int, int], groups: int, ratio: float, device: Device) -> float:
    load = Load(*shape, device.planned_tokens, device.planned_batch, element_bytes=device.dense_bytes or 2)
    return predicted_speedup(typical_plan(*shape[1:], load.tokens, ratio, groups, 64), load, device)


@given(st.sampled_from(list(SHAPES.values())), st.sampled_from([3.0, 4.0, 8.0, 16.0]), st.sampled_from([CPU, H200]))
def test_no_fewer_groups_are_fast_enough(shape, ratio, device):
    chosen = fewest_groups((shape,), 2, ratio, 64, device).count
    assert shape[1] % chosen == 0
    fewer = [n for n in range(1, chosen) if shape[1] % n == 0]
    assert all(speed(shape, n, ratio, device) < LEAST_SPEED for n in fewer)
    assert speed(shape, chosen, ratio, device) >= LEAST_SPEED


def test_few_heads_share_one_basis_and_many_do_not_on_a_cpu():
    found = {
        name: [fewest_groups((shape,), 4, ratio, 64, CPU).count for ratio in (4, 8, 16)]
        for name, shape in SHAPES.items()
    }
    assert found["SmolLM2-135M"] == [1, 1, 1]
    assert found["LLaVA-1.5-7B"][0] > found["LLaVA-1.5-7B"][1] > 1
    assert found["Qwen2.5-VL-7B"][0] > found["Qwen2.5-VL-7B"][2] == 1


def test_groups_divide_the_heads_of_every_layer():
    slow = replace(CPU, matrix_operations=1e9)
    assert fewest_groups(((8, 4, 64), (6, 6, 64)), 4, 4.0, 64, slow).count == 2
    assert fewest_groups(((71, 1, 64),), 4, 4.0, 64, slow).count == 1


def test_where_none_is_fast_enough_the_fastest_is_taken():
    slow = replace(CPU, matrix_operations=1e9)
    speeds = {n: speed((8, 8, 64), n, 4.0, slow) for n in (1, 2, 4, 8)}
    assert max(speeds.values()) < LEAST_SPEED
    assert fewest_groups(((8, 8, 64),), 4, 4.0, 64, slow).count == max(speeds, key=lambda n: speeds[n])


def test_groups_that_cannot_reach_the_ratio_are_left_out():
    slow = replace(CPU, matrix_operations=1e9)
    assert largest_ratio(16) < 8 < largest_ratio(32)
    assert fewest_groups(((4, 4, 16),), 4, 8.0, 64, slow).count == 2
    assert fewest_groups(((4, 4, 16),), 4, 4.0, 64, slow).count == 4


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("ratio", (3.0, 8.0))
def test_a_typical_plan_keeps_the_byte_budget(ratio, groups):
    plan = typical_plan(8, 64, 8_192, ratio, groups, 64)
    held = sum(groups * (stream.bands.token_bytes + 2) for stream in plan.layers[0].streams[2:])
    # bits are given to runs of 16 components
    assert 0.93 <= held * ratio / (2 * 2 * 8 * 64) <= 1.0
    assert plan.groups == groups and plan.turn.block == 64


def many_heads() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(num_attention_heads=16, num_key_value_heads=16, head_dim=64, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


def prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 64, (1, 300), generator=torch.Generator().manual_seed(seed))}


def test_a_model_of_many_heads_gets_groups_and_the_report_says_why():
    model = apack_compile.optimize(many_heads(), ratio=4, compile="none")
    assert apack_compile.report(model).head_groups == ""
    apack_compile.calibrate(model, prompt())
    groups = fewest_groups(((16, 16, 64),), 4, 4.0, 64, CPU).count
    assert groups > 1 and apack_compile.plan_for(model, 300).groups == groups
    said = apack_compile.report(model).head_groups
    assert said.startswith(f"{groups}; predicted speed over a dense cache (ratio 4, 8,192 tokens, batch 1, CPU): ")
    assert f"head groups: {said}" in str(apack_compile.report(model))
    out = model.generate(**prompt(1), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 305) and apack_compile.report(model).bytes["ratio"] > 2.5


def test_a_calibration_for_other_groups_is_not_used_silently():
    model = apack_compile.optimize(many_heads(), ratio=4, compile="none")
    apack_compile.calibrate(model, prompt())
    before = apack_compile.plan_for(model, 300).groups
    apack_compile.optimize(model, ratio=5, compile="none")
    assert apack_compile.plan_for(model, 300).groups == before
    one = AttentionPackConfig(ratio=4, head_groups=1, compile="none")
    apack_compile.optimize(model, one)
    lost = f"what was calibrated before does not serve (head_groups={before})"
    assert any(note.startswith(lost) for note in apack_compile.report(model).notes)
    with pytest.raises(RuntimeError, match="no calibrated statistics"):
        apack_compile.plan_for(model, 300)
    apack_compile.calibrate(model, prompt())
    assert apack_compile.plan_for(model, 300).groups == 1
    assert apack_compile.report(model).head_groups == "1; as configured"
    assert not any("calibrated before" in note for note in apack_compile.report(model).notes)
    apack_compile.optimize(model, preset="lossless", compile="none")
    apack_compile.optimize(model, one)
    assert apack_compile.plan_for(model, 300).groups == 1


def test_a_calibration_that_fails_keeps_what_was_there():
    model = apack_compile.optimize(many_heads(), ratio=4, compile="none")
    apack_compile.calibrate(model, prompt())
    said = apack_compile.report(model).head_groups
    with pytest.raises(ValueError, match="no usable token"):
        apack_compile.calibrate(model, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    assert apack_compile.report(model).head_groups == said and apack_compile.plan_for(model, 300).groups > 1
