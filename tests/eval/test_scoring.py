"""Log-probabilities over a packed cache: right in every layout of a batch, and really read from it."""

import contextlib
import io
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_llama import dense_scores, gemma3, gpt2, jamba, lfm2, llama, qwen3_next, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import apack_compile
from apack_compile import AttentionPackConfig, scoring
from apack_compile.scoring import Row, packed_tokens, padded, score

READ, OTHER = tokens(120, 1), tokens(77, 2)
ROWS = (
    Row(READ, tokens(5, 3), (tokens(5, 4), tokens(5, 5))),
    Row(READ, tokens(70, 6), (tokens(70, 7),)),
    Row(OTHER, tokens(33, 8), (tokens(33, 9),)),
    Row(OTHER, tokens(1, 10), (tokens(1, 11), tokens(1, 12), tokens(1, 13))),
)
ROLLING = Row((), tokens(130, 14), (tokens(130, 15),))
RANKS = dict.fromkeys(("vision_key", "vision_value", "text_key", "text_value"), 4)
SETTINGS = (
    {"preset": "lossless"},
    {"ratio": 3},
    {"preset": "a-vl"},
    {"preset": "attentionpack", "ranks": RANKS, "tail_slots": 32},
)
NAMES = ("lossless", "ratio", "a-vl", "attentionpack")


class Operations(TorchDispatchMode):
    """Counts our operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "apack":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return llama()


def flat(scores) -> list[float]:
    return [log_prob for row in scores.rows for log_prob in row.log_probs]


def by_hand(model, row: Row, chunk: int) -> list[float]:
    """A row's log-probabilities: a prompt, then chunks after it, through the model's own call."""
    cache = apack_compile.new_cache(model, len(row.inputs))
    none = torch.zeros(1, len(row.tokens), dtype=torch.bool)
    cache.groups.choose_plans(none, none)
    logits = []
    with torch.no_grad():
        if row.read:
            model(torch.tensor([row.read]), past_key_values=cache)
        for start in range(0, len(row.inputs), chunk):
            piece = torch.tensor([row.inputs[start : start + chunk]])
            logits.append(model(piece, past_key_values=cache).logits[0])
    log_probs = torch.cat(logits).log_softmax(-1)
    return log_probs.gather(1, torch.tensor(row.targets).T).sum(0).tolist()


@pytest.mark.parametrize("batch", ([0], [0, 1], [0, 1, 2, 3], [3, 1], [2, 0, 3, 1]), ids=str)
@pytest.mark.parametrize("chunk", (7, 32))
def test_lossless_scores_are_those_of_the_dense_model(model, batch, chunk):
    rows = [ROWS[i] for i in batch]
    apack_compile.optimize(model, preset="lossless", compile="none")
    scores = score(model, rows, chunk)
    apack_compile.restore(model)
    want = [pair for row in rows for pair in dense_scores(model, row)]
    assert flat(scores) == pytest.approx([log_prob for log_prob, _ in want], abs=2e-3)
    assert [greedy for row in scores.rows for greedy in row.greedy] == [greedy for _, greedy in want]
    assert all(found.packed_tokens == len(row.inputs) for found, row in zip(scores.rows, rows, strict=True))


@pytest.mark.parametrize("build", (gpt2, gemma3, lfm2, jamba, qwen3_next), ids=lambda build: build.__name__)
def test_every_kind_of_position_and_layer_scores_as_the_dense_model(build):
    model = build()
    apack_compile.optimize(model, preset="lossless", compile="none")
    scores = score(model, ROWS)
    rolling = score(model, [ROLLING, Row((), ROLLING.inputs[:50], (ROLLING.targets[0][:50],))])
    apack_compile.restore(model)
    want = [log_prob for row in ROWS for log_prob, _ in dense_scores(model, row)]
    assert flat(scores) == pytest.approx(want, abs=2e-3)
    assert flat(rolling)[0] == pytest.approx(dense_scores(model, ROLLING)[0][0], abs=2e-3)
    assert scores.rows[1].packed_tokens == 70


def test_the_likeliest_tokens_are_greedy(model):
    with torch.no_grad():
        likeliest = tuple(model(torch.tensor([ROWS[0].tokens])).logits[0, -5:].argmax(-1).tolist())
    almost = (*likeliest[:-1], (likeliest[-1] + 1) % 40)
    apack_compile.optimize(model, preset="lossless", compile="none")
    scores = score(model, [Row(READ, ROWS[0].inputs, (likeliest, almost))])
    apack_compile.restore(model)
    assert scores.rows[0].greedy == [True, False]


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("row", (ROWS[0], ROWS[1], ROLLING), ids=("short", "long", "rolling"))
def test_a_row_scores_as_prompt_and_chunks_do_by_hand(model, setting, row):
    apack_compile.optimize(model, AttentionPackConfig(compile="none", **setting, min_tokens=0))
    if "ratio" in setting:
        apack_compile.calibrate(model, {"input_ids": torch.tensor([tokens(300, 20)])})
    assert flat(score(model, [row])) == pytest.approx(by_hand(model, row, 32), abs=1e-4)
    assert flat(score(model, [row], 5)) == pytest.approx(by_hand(model, row, 5), abs=1e-4)
    apack_compile.restore(model)


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_padding_and_company_do_not_change_a_row(model, setting):
    apack_compile.optimize(model, AttentionPackConfig(compile="none", **setting, min_tokens=0))
    if "ratio" in setting:
        apack_compile.calibrate(model, {"input_ids": torch.tensor([tokens(300, 20)])})
    same_plan = Row(READ, tokens(70, 21), (tokens(70, 22),))
    alone = [log_prob for row in ROWS for log_prob in flat(score(model, [row, same_plan]))[: len(row.targets)]]
    together = flat(score(model, [*ROWS, same_plan]))[: len(alone)]
    assert together == pytest.approx(alone, abs=0.02)
    apack_compile.restore(model)


def test_scores_are_read_from_packed_keys(model):
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": torch.tensor([tokens(300, 20)])})
    with Operations() as operations:
        scores = score(model, [ROWS[1]])
    layers, chunks = 3, 3
    assert operations.counts["append"] == operations.counts["attend"] == layers * chunks
    assert scores.rows[0].packed_tokens == 70
    assert scores.bytes["ratio"] > 2
    apack_compile.restore(model)
    (dense,) = dense_scores(model, ROWS[1])
    assert abs(scores.rows[0].log_probs[0] - dense[0]) > 0.1


def test_what_nothing_was_packed_for_is_counted(model):
    """A sequence's tail of 64 tokens is dense; so is a prompt of first tokens."""
    apack_compile.optimize(model, preset="attentionpack", compile="none")
    assert score(model, [Row(READ[:40], ROWS[0].inputs, ROWS[0].targets)]).rows[0].packed_tokens == 0
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": torch.tensor([tokens(300, 20)])})
    scores = score(model, [Row(READ[:3], (READ[3],), ((5,),)), ROWS[0]])
    assert [row.packed_tokens for row in scores.rows] == [0, 5]
    # the first 32 tokens of a window have no cache before them
    assert score(model, [ROLLING]).rows[0].packed_tokens == len(ROLLING.inputs) - 32
    apack_compile.restore(model)


def test_the_first_rows_calibrate_where_nothing_did(model):
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    scores = score(model, [ROLLING])
    assert apack_compile.report(model).calibrated_on == "the first request"
    with pytest.raises(ValueError, match="the first request cannot serve as calibration"):
        score(apack_compile.optimize(llama(), ratio=3, compile="none", min_tokens=0), [Row((), (5,), ((6,),))])
    assert scores.rows[0].packed_tokens > 0
    apack_compile.restore(model)


@pytest.mark.parametrize("chunk", (32, 30))
def test_long_windows_keep_the_ratio_of_a_plan_with_coarse_tokens(monkeypatch, chunk):
    model = llama(4096, head_dim=32)
    apack_compile.optimize(model, AttentionPackConfig(ratio=6, compile="none", min_tokens=0))
    apack_compile.calibrate(model, {"input_ids": torch.tensor([tokens(1500, 30)])})
    row = Row((), tokens(1300, 31), (tokens(1300, 32),))
    with_spans = score(model, [row], chunk)
    assert apack_compile.report(model).bytes["coarse"] is not None
    monkeypatch.setattr(scoring, "SPAN", 10_000)
    without = score(model, [row], chunk)
    assert with_spans.bytes["tokens"] == without.bytes["tokens"] == 1300
    assert with_spans.bytes["ratio"] > without.bytes["ratio"]


def test_report_shows_what_the_scores_were_read_from(model):
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    scores = score(model, [ROLLING])
    report = apack_compile.report(model)
    assert report.bytes["tokens"] == 130 and report.bytes["ratio"] == scores.bytes["ratio"]
    apack_compile.restore(model)


def test_padded_rows_and_packed_tokens_of_each(model):
    inputs = padded([tokens(40, 1), tokens(9, 2)], torch.device("cpu"), "left")
    assert inputs["attention_mask"].sum(1).tolist() == [40, 9]
    assert inputs["input_ids"][1, -9:].tolist() == list(tokens(9, 2))
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(model)
    model(**inputs, past_key_values=cache)
    assert packed_tokens(cache).tolist() == [36, 5]
    apack_compile.restore(model)


@pytest.mark.parametrize(
    ("rows", "chunk", "message"),
    (
        ([], 32, r"rows=\[\] must hold at least one Row"),
        ([ROWS[0], Row((5,), (), ((),))], 32, r"rows\[1\]: 0 inputs and targets of \[0\] tokens; must be as many"),
        (
            [Row((5,), (6, 7), ((7, 8), (7,)))],
            32,
            r"rows\[0\]: 2 inputs and targets of \[2, 1\] tokens; must be as many",
        ),
        *(([ROWS[0]], n, f"chunk_tokens={n!r} must be an integer from 1 to 32") for n in (0, 33, True, 2.5, "4")),
    ),
)
def test_bad_arguments_are_named(model, rows, chunk, message):
    apack_compile.optimize(model, preset="lossless", compile="none")
    with pytest.raises(ValueError, match=message):
        score(model, rows, chunk)
    apack_compile.restore(model)
    with pytest.raises(ValueError, match="is not optimized"):
        score(model, [ROWS[0]])


def test_perplexity_as_the_documentation_has_it(model):
    page = Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md"
    if not page.is_file():
        pytest.skip("runs in a checkout only")
    (code,) = (block for block in page.read_text().split("```python\n") if "import Row" in block)
    ids, out = list(tokens(200, 40)), io.StringIO()
    apack_compile.optimize(model, preset="lossless", compile="none")
    with contextlib.redirect_stdout(out):
        exec(code.partition("```")[0], {"model": model, "ids": ids})
    apack_compile.restore(model)
    loss, packed, ratio = map(float, out.getvalue().split())
    inputs = torch.tensor([ids])
    assert loss == pytest.approx(float(model(input_ids=inputs, labels=inputs).loss), abs=1e-4)
    assert packed == 199 - 32 and math.isfinite(ratio)
