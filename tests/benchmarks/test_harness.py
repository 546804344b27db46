"""What the benchmarks share."""

import harness
import torch


def test_measuring_threads_leaves_their_number():
    threads = torch.get_num_threads()
    assert harness.thread_speedup() > 0
    assert torch.get_num_threads() == threads
