"""The crossing that the benchmark of short prompts reports."""

from crossover import crossing


def rows_of(*speeds: tuple[int, float]) -> list[dict]:
    return [{"tokens": tokens, "speedup_of_fastest_rounds": speed} for tokens, speed in speeds]


def test_the_crossing_is_where_no_longer_prompt_is_slower():
    rows = rows_of((64, 0.9), (64, 1.2), (128, 0.96), (256, 0.99), (256, 1.3))
    assert crossing(rows, 0.95) == 128
    assert crossing(rows, 0.85) == 64
    assert crossing([*rows, *rows_of((512, 0.7))], 0.95) is None
    assert crossing(rows_of((64, 0.99), (128, 0.94), (256, 0.95)), 0.95) == 256
