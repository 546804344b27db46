"""What an H200 shall reach, held against the rows of a result file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import Row

QWEN, LLAVA = "Qwen2.5-VL-7B", "LLaVA-1.5-7B"
RATIO_8, RANK_64 = "ratio=8", "attentionpack, rank 64"


@dataclass(frozen=True)
class Target:
    """A figure of some rows and what it must be: at least, or at most where `most`; the worst row counts.

    rows: values that the columns of a row must have. since: the fewest tokens of a row.
    """

    name: str
    figure: str
    wanted: float
    rows: Mapping[str, Any] = field(default_factory=dict)
    since: int = 0
    most: bool = False

    def matches(self, row: Row) -> bool:
        """Whether the target is about this row."""
        about = all(row.get(column) == value for column, value in self.rows.items())
        return about and self.figure in row and row.get("tokens", 0) >= self.since

    def verdict(self, rows: Sequence[Row]) -> Row:
        """A row that says what was found."""
        found = [row[self.figure] for row in rows if self.matches(row)]
        worst = (max if self.most else min)(found) if found else None
        met = worst is not None and (worst <= self.wanted if self.most else worst >= self.wanted)
        return {
            "bench": "targets",
            "target": self.name,
            "figure": self.figure,
            "wanted": f"{'<=' if self.most else '>='} {self.wanted:g}",
            "found": worst,
            "verdict": "not measured" if worst is None else "met" if met else "missed",
        }


def attend_at(shape: str, tokens: int, batch: int, plan: str) -> dict[str, Any]:
    """Rows of attend.py for a shape, length, batch and plan."""
    return {"bench": "attend", "shape": shape, "tokens": tokens, "batch": batch, "plan": plan}


QWEN_32K = attend_at(QWEN, 32_768, 16, RATIO_8)
LLAVA_4K, LLAVA_4K_PAPER = (attend_at(LLAVA, 4_096, 32, plan) for plan in (RATIO_8, RANK_64))
TARGETS = (
    Target("attention, Qwen, 32k x 16, ratio 8", "speedup_vs_dense", 3.5, QWEN_32K),
    Target("attention, LLaVA, 4k x 32, ratio 8", "speedup_vs_dense", 5.0, LLAVA_4K),
    Target("attention, LLaVA, 4k x 32, rank 64 in 16 bits", "speedup_vs_dense", 10.0, LLAVA_4K_PAPER),
    Target("share of the tightest limit, Qwen", "share_of_limit", 0.7, QWEN_32K),
    Target("share of the tightest limit, LLaVA", "share_of_limit", 0.7, LLAVA_4K),
    Target("share of the tightest limit, LLaVA, rank 64", "share_of_limit", 0.7, LLAVA_4K_PAPER),
    Target("attention of one request, from 2k tokens", "speedup_vs_dense", 1.0, {"bench": "attend", "batch": 1}, 2_048),
    Target("compaction, 8k", "compaction_share", 0.05, {"bench": "decode", "tokens": 8_192}, most=True),
    Target("decode, 32k x 16", "speedup_vs_dense", 1.8, {"bench": "decode", "tokens": 32_768, "batch": 16}),
    Target("decode, 128k", "speedup_vs_dense", 2.5, {"bench": "decode", "tokens": 131_072}),
    Target("decode of one request, from 2k tokens", "speedup_vs_dense", 1.0, {"bench": "decode", "batch": 1}, 2_048),
    Target(
        "time per token, 128k over 32k", "time_per_token_vs_32k", 1.1, {"bench": "attend", "tokens": 131_072}, most=True
    ),
)


def with_time_per_token(rows: Sequence[Row]) -> list[Row]:
    """Rows, those of 128k tokens with their time per token over that of 32k where both were measured."""

    def key(row: Row) -> tuple:
        return tuple(row.get(column) for column in ("bench", "shape", "plan", "batch", "dtype", "groups"))

    of_32k = {key(row): row for row in rows if row.get("tokens") == 32_768 and "packed_ms" in row}
    return [
        {**row, "time_per_token_vs_32k": row["packed_ms"] / of_32k[key(row)]["packed_ms"] * 32_768 / row["tokens"]}
        if row.get("tokens") == 131_072 and "packed_ms" in row and key(row) in of_32k
        else row
        for row in rows
    ]


def verdicts(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Row]:
    """One row a target."""
    return [target.verdict(rows) for target in targets]
