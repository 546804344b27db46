"""Rows of the shared prefix's benchmark: both sides hold the same tokens."""

import pytest
import shared_prefix
import torch


@pytest.mark.parametrize("ratio", (4.0, 8.0, None))
def test_branches_attend_as_copies_do_and_are_timed(ratio):
    # it compares the outputs itself
    row = shared_prefix.measured("SmolLM2-135M", 1_100, 3, ratio, torch.float32, "cpu", 0.05, 64)
    assert row["branches"] == 3 and row["shared_prefix_step_ratio"] > 0
    assert 1 / 3 < row["bytes_ratio"] < 0.75
