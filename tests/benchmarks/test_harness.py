"""What the benchmarks share."""

from collections.abc import Callable, Iterator

import harness
import pytest
import torch


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_threads_are_timed_alone_and_together(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    measured = harness.timed

    def timed(call: Callable[[], torch.Tensor], repeats: int, device: str) -> float:
        seconds = measured(call, repeats, device)
        seen.append(torch.get_num_threads())
        return seconds

    monkeypatch.setattr(harness, "timed", timed)
    assert harness.thread_speedup() > 0
    assert set(seen) == {1, threads}


def test_measuring_threads_leaves_their_number(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(calls: dict[str, Callable[[], torch.Tensor]], seconds: float) -> None:
        calls["one"]()
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "interleaved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness.thread_speedup()
    assert torch.get_num_threads() == threads
