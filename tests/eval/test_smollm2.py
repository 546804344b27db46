"""A task of lm-eval with a real small model: SmolLM2-135M, dense and packed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import apack_compile
from apack_compile.demo import assets
from apack_compile.eval import PackedLM

STORY = """Anna keeps a red boat at the lake behind the mill. Every morning she rows to the small island, feeds the grey geese, and is
back before the baker opens his shop. Her brother Tom never goes with her, since he cannot swim and is afraid of deep water. On
Sundays their mother cooks fish soup with carrots, and the whole family sits on the porch until the lamps are lit. Last winter the
lake froze for three weeks, so the boat stood in the barn, upside down on two old barrels. """
QUESTIONS = (
    ("What colour is Anna's boat? The boat is", [" red", " green", " blue"], 0),
    ("What does Anna feed on the island? She feeds the", [" black cows", " grey geese", " small cats"], 1),
    ("Where did the boat stand last winter? It stood in the", [" harbour", " kitchen", " barn"], 2),
)


class Updates(TorchDispatchMode):
    """Counts what appends to a packed cache, and attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "apack":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def task(folder: Path) -> dict:
    data = [{"question": STORY + question, "choices": choices, "answer": i} for question, choices, i in QUESTIONS]
    (folder / "story.json").write_text("\n".join(map(json.dumps, data)))
    return {
        "task": "story",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "story.json")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


@pytest.mark.slow
def test_dense_numbers_are_those_of_hflm_and_packed_ones_come_from_packed_keys(tmp_path: Path) -> None:
    model, tokenizer = assets.load_model(), assets.load_tokenizer()
    described, tasks = task(tmp_path), TaskManager(include_defaults=False)

    def evaluated(lm: HFLM) -> tuple[dict, list[tuple[float, bool]]]:
        out = simple_evaluate(lm, tasks=[described], task_manager=tasks, bootstrap_iters=0)
        samples = sorted(out["samples"]["story"], key=lambda sample: sample["doc_id"])
        return out, [answer for sample in samples for answer in sample["filtered_resps"]]

    dense, wanted = evaluated(HFLM(model, tokenizer=tokenizer, batch_size=3))
    ours, same = evaluated(PackedLM(model, tokenizer=tokenizer, batch_size=3))
    assert same == wanted and ours["results"] == dense["results"]
    lm = PackedLM(model, tokenizer=tokenizer, batch_size=1, ratio=4, compile="none")
    with Updates() as updates:
        packed, scores = evaluated(lm)
    # one batch for each question: its choices share their context and are no longer than a chunk
    layers = len(apack_compile.report(model).layers)
    assert updates.counts["append"] == updates.counts["attend"] == layers * len(QUESTIONS)
    asked = sum(len(choices) for _, choices, _ in QUESTIONS)
    info = packed["config"]["apack"]
    assert (info["requests_packed"], info["requests_dense"]) == (asked, 0)
    assert info["packed_tokens"] == info["scored_tokens"] >= asked
    assert info["ratio"] > 2.5
    differences = [abs(got[0] - want[0]) for got, want in zip(scores, wanted, strict=True)]
    assert 1e-4 < max(differences) < 1
    assert packed["results"]["story"]["acc,none"] == dense["results"]["story"]["acc,none"] == 1
