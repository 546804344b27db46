"""From what was measured to tables and pictures."""

from collections.abc import Sequence
from typing import Any

from harness import Row
from measure import Measured, Trial
from text_quality import continuation_rows, text_means, text_rows
from vision_quality import turn_rows, vision_rows

Results = Sequence[tuple[Trial, Sequence[Measured]]]


def tables_of(
    tokenizer: Any, benches: dict[str, Results], continuation: bool, needle: bool
) -> dict[tuple[str, str], list[Row]]:
    """Tables by bench and title."""
    tables: dict[tuple[str, str], list[Row]] = {}
    if "text" in benches:
        results = benches["text"]
        tables["text-place", "KL against the dense cache, by place"] = text_rows(results)
        tables["text", "mean over places"] = text_means(results)
        if continuation:
            tables["continuation", "KL over a greedy continuation"] = continuation_rows(results)
    if "vision" in benches:
        results = benches["vision"]
        tables["vision", "questions about pictures"] = vision_rows(tokenizer, results, False)
        if needle:
            rows = vision_rows(tokenizer, results, True)
            tables["needle", "by the position of the picture asked about"] = rows
    if "turns" in benches:
        tables["turns", "KL over the turns of a conversation"] = turn_rows(benches["turns"])
    return tables


def shown(row: Row) -> Row:
    """A row as it is printed: the reason in the note's place, decoded copies left to the JSON."""
    kept = {name: value for name, value in row.items() if name not in ("reason", "note", "decoded_bytes")}
    return {**kept, "note": (row["reason"] or row.get("note", ""))[:60]}
