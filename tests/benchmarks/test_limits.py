"""Predictions of the time model for the benchmark's shapes."""

import limits
import pytest
from attend import SHAPES

from apack_compile.plan.choice import HARM_OF_A_BASIS_PER_HEAD
from apack_compile.plan.time_model import H200


def test_group_counts_divide_the_kv_heads():
    assert limits.group_counts(SHAPES["LLaVA-1.5-7B"]) == [1, 2, 4, 8, 16, 32]
    assert limits.group_counts(SHAPES["SmolLM2-135M"]) == [1, 3]


def test_a_plan_loses_more_with_wider_blocks_and_more_groups():
    shape = SHAPES["Qwen2.5-VL-7B"]

    def loses(groups, block):
        return limits.plan_of(shape, 8.0, 2_048, groups, block).layers[0].text_key.expected_error

    blocks = [loses(1, block) for block in (32, 64, 128, 256, 0)]
    assert blocks == sorted(blocks) and blocks[0] == 1
    assert loses(4, 32) == pytest.approx(HARM_OF_A_BASIS_PER_HEAD)
    assert loses(1, 32) < loses(2, 32) < loses(4, 32)


def test_relative_keys_of_32_slots_are_what_a_busy_gpu_cannot_afford():
    shape = SHAPES["Qwen2.5-VL-7B"]
    load = limits.load_of(shape, 32_768, 16)
    chosen = limits.choose(shape, load, 8.0, H200, 3.0)
    assert chosen.key_block != 32
    assert chosen.speedup >= 3.0
    default = limits.option_of(limits.plan_of(shape, 8.0, 32_768, 1, 32), load, H200)
    assert default.speedup < 2.0 < limits.option_of(limits.plan_of(shape, 8.0, 32_768, 1, 256), load, H200).speedup
