"""Rewrites random graphs around attention and compares each with itself.

    python benchmarks/fuzz_graphs.py --graphs 10000

Prints wrong rewrites with their seeds (`random_program(seed, dtype)` builds the graph again), the share of attentions that were found
and rewritten, and why the others were not. Exits with 1 when a rewrite is wrong. The graphs are those of tests/support/random_graphs.py.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from fuzz import Verdict, judge


def main() -> int:
    """Judge graphs and print what came of them; 1 when one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10000, help="how many graphs")
    parser.add_argument("--first", type=int, default=0, help="seed of the first graph")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    given = parser.parse_args()
    start, verdicts = time.monotonic(), {}
    for seed in range(given.first, given.first + given.graphs):
        if time.monotonic() - start > given.seconds:
            break
        verdicts[seed] = judge(seed)
    print("\n".join(summary(verdicts)))
    print(f"{time.monotonic() - start:.0f} s")
    return any(v.wrong for v in verdicts.values())


def summary(verdicts: dict[int, Verdict]) -> list[str]:
    """The lines that say what came of the graphs."""
    wrong = {seed: v.wrong for seed, v in verdicts.items() if v.wrong}
    attentions = sum(v.attentions for v in verdicts.values())
    rewritten = sum(v.rewritten for v in verdicts.values())
    reasons = Counter(reason for v in verdicts.values() for reason in v.reasons)
    return [
        f"{len(wrong)} wrong of {len(verdicts)} graphs",
        *(f"  seed {seed}: {what}" for seed, what in wrong.items()),
        f"{rewritten} of {attentions} attentions rewritten ({rewritten / max(attentions, 1):.1%})",
        "reasons of the others, and of caches that something else reads too:",
        *(f"{count:6}  {reason}" for reason, count in reasons.most_common()),
    ]


if __name__ == "__main__":
    sys.exit(main())
