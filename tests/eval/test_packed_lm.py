"""lm-eval's HFLM over a packed cache: HFLM's own numbers where nothing is packed, and scores from packed keys where it is."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_llama import llama, text, tokenizer, tokens

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.eval import PackedLM

CALIBRATION = {"input_ids": torch.tensor([tokens(180, 20)])}
# (context, choices): choices of one token and of several, one longer than a chunk, an empty context
QUESTIONS = [
    (text(150, 1), ["a", "b", "cd"]),
    (text(61, 2), ["abcabc", text(80, 3)]),
    (text(90, 4), ["a"]),
    ("", [text(12, 5)]),
    (text(250, 6), ["abc", "a b"]),
]
DOCUMENTS = [text(length, 30 + length) for length in (20, 150, 300)]
PROMPTS = [text(length, 60 + length) for length in (40, 130, 90)]


@pytest.fixture
def model():
    return llama(192)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def choices() -> list[Instance]:
    return requests("loglikelihood", *[(context, choice) for context, some in QUESTIONS for choice in some])


def documents() -> list[Instance]:
    return requests("loglikelihood_rolling", *[(document,) for document in DOCUMENTS])


def prompts(tokens: int = 20) -> list[Instance]:
    settings = {"until": ["zz"], "max_gen_toks": tokens}
    return requests("generate_until", *[(prompt, settings) for prompt in PROMPTS])


def lm(kind: type[HFLM], model, **options) -> HFLM:
    return kind(model, tokenizer=tokenizer(), **{"batch_size": 1} | options)


def close(got, want, tolerance: float) -> None:
    assert [x[0] for x in got] == pytest.approx([x[0] for x in want], abs=tolerance)
    assert [x[1] for x in got] == [x[1] for x in want]


@pytest.mark.parametrize("batch_size", (1, 3))
@pytest.mark.parametrize("restored", (False, True))
def test_a_model_that_is_not_optimized_gets_the_numbers_of_hflm(model, batch_size, restored, caplog):
    if restored:
        apack_compile.restore(apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0))
    with caplog.at_level(logging.WARNING):
        packed = lm(PackedLM, model, batch_size=batch_size)
    assert "apack: the model is not optimized" in caplog.text
    dense = lm(HFLM, model, batch_size=batch_size)
    assert packed.loglikelihood(choices()) == dense.loglikelihood(choices())
    assert packed.loglikelihood_rolling(documents()) == dense.loglikelihood_rolling(documents())
    assert packed.generate_until(prompts()) == dense.generate_until(prompts())
    assert packed.counts.packed == 0 and packed.counts.ratio is None
    assert list(packed.counts.dense_because) == ["the model is not optimized"]


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), ((1, 32), (2, 1), (3, 7), (64, 32)))
def test_lossless_numbers_are_those_of_hflm(model, batch_size, chunk_tokens):
    want = lm(HFLM, model)
    scores, rolling, texts = (
        want.loglikelihood(choices()),
        want.loglikelihood_rolling(documents()),
        want.generate_until(prompts()),
    )
    packed = lm(PackedLM, model, batch_size=batch_size, chunk_tokens=chunk_tokens, preset="lossless", compile="none")
    close(packed.loglikelihood(choices()), scores, 5e-3)
    assert packed.loglikelihood_rolling(documents()) == pytest.approx(rolling, abs=2e-2)
    assert packed.generate_until(prompts()) == texts


RANKS = dict.fromkeys(("vision_key", "vision_value", "text_key", "text_value"), 4)


@pytest.mark.parametrize(
    "setting",
    ({"ratio": 3}, {"preset": "a-vl"}, {"preset": "attentionpack", "ranks": RANKS, "tail_slots": 32}),
    ids=("ratio", "a-vl", "attentionpack"),
)
def test_answers_of_every_setting_come_from_packed_keys(model, setting):
    dense = lm(HFLM, model).loglikelihood(choices())
    packed = lm(PackedLM, model, batch_size=4, config=AttentionPackConfig(compile="none", **setting, min_tokens=0))
    if "ratio" in setting:
        apack_compile.calibrate(model, CALIBRATION)
    answers = packed.loglikelihood(choices())
    # of the empty context nothing is packed before its few tokens are scored
    assert packed.counts.packed >= 5 and packed.counts.packed + packed.counts.dense == len(answers)
    assert len([1 for got, want in zip(answers, dense, strict=True) if abs(got[0] - want[0]) > 1e-2]) >= 4
    packed.loglikelihood_rolling(documents())
    packed.generate_until(prompts())
    assert packed.counts.packed_tokens > 300
    assert packed.counts.ratio > 1


def test_a_plan_and_its_path_score_alike(model, tmp_path):
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    apack_compile.calibrate(model, CALIBRATION)
    plan = apack_compile.plan_for(model, 150)
    plan.save(tmp_path / "plan.safetensors")
    by_plan = lm(PackedLM, model, plan=plan, compile="none").loglikelihood(choices())
    loaded = lm(PackedLM, model, plan=str(tmp_path / "plan.safetensors"), compile="none")
    assert loaded.loglikelihood(choices()) == by_plan
    assert loaded.counts.packed > 0


def test_a_configuration_may_be_a_file(model, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(AttentionPackConfig(ratio=3, head_groups=2, compile="none", min_tokens=0).to_json())
    packed = lm(PackedLM, model, config=str(path))
    assert packed.session.config.head_groups == 2


def test_contexts_below_min_tokens_get_the_numbers_of_hflm_and_are_counted(model):
    dense = lm(HFLM, model).loglikelihood(choices())
    packed = lm(PackedLM, model, ratio=3, min_tokens=100, compile="none")
    apack_compile.calibrate(model, CALIBRATION)
    answers = packed.loglikelihood(choices())
    short = [i for i, request in enumerate(choices()) if sum(map(len, request.args)) < 100]
    assert len(short) == 3
    for i, (got, want) in enumerate(zip(answers, dense, strict=True)):
        if i in short:
            assert got == want
        else:
            assert abs(got[0] - want[0]) > 1e-4
    assert packed.counts.dense_because == {"fewer tokens than min_tokens=100": 3}
    assert packed.counts.packed == len(answers) - 3
    characters = [len(request.args[1]) for request in choices()]
    assert packed.counts.scored_tokens == sum(characters)
    assert packed.counts.packed_tokens == sum(characters) - sum(characters[i] for i in short)
    packed.generate_until(prompts(20))
    assert packed.counts.packed == len(answers) - 3 + 2
    assert "prompt of 40 and 20 new tokens; packed from min_tokens=100 on" in packed.counts.dense_because


def test_the_default_of_the_device_is_no_reason_to_score_densely(model, monkeypatch):
    monkeypatch.setattr("apack_compile.generate.session.default_min_tokens", lambda device: 10_000)
    packed = lm(PackedLM, model, ratio=3, compile="none")
    apack_compile.calibrate(model, CALIBRATION)
    packed.loglikelihood(choices()[:3])
    packed.generate_until(prompts())
    assert (packed.counts.packed, packed.counts.dense) == (6, 0)


def test_a_cache_of_another_kind_is_counted_as_dense(model):
    packed = lm(PackedLM, model, ratio=3, compile="none")
    packed.generate_until(
        requests("generate_until", (PROMPTS[0], {"max_gen_toks": 5, "cache_implementation": "static"}))
    )
    assert packed.counts.dense_because == {"cache_implementation='static'": 1}


def test_rows_of_one_context_are_scored_together(model):
    packed = lm(PackedLM, model, preset="lossless", compile="none")
    calls: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    packed.loglikelihood(choices()[:3])
    # "a" and "b" share a row: they follow the same tokens
    assert calls == [(1, 149), (2, 2)]


def test_figures_of_an_evaluation_say_what_they_come_from(model, caplog):
    packed = lm(PackedLM, model, ratio=3, compile="none")
    apack_compile.calibrate(model, CALIBRATION)
    with caplog.at_level(logging.INFO):
        packed.loglikelihood(choices())
    assert f"apack: {packed.counts}" in caplog.text
    assert str(packed.counts).startswith("8 of 9 requests were answered from packed keys and values")
    info = packed.get_model_info()["apack"]
    assert (info["requests_packed"], info["requests_dense"]) == (8, 1)
    assert info["ratio"] == packed.counts.ratio > 1
    json.dumps(info)


def disturbed(model, config):
    """The model with an adapter whose weights are not what PEFT starts with: those change nothing."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    with_adapter = peft.get_peft_model(model, config(peft)).eval()
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora" in name or "prompt" in name:
                parameter.normal_(std=0.3)
    return with_adapter


def test_adapters_are_part_of_what_is_scored(model):
    plain = lm(HFLM, model).loglikelihood(choices())
    adapted = disturbed(model, lambda peft: peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    want = lm(HFLM, adapted).loglikelihood(choices())
    packed = lm(PackedLM, adapted, preset="lossless", compile="none")
    got = packed.loglikelihood(choices())
    assert [x[0] for x in got] == pytest.approx([x[0] for x in want], abs=5e-3)
    assert max(abs(a[0] - b[0]) for a, b in zip(want, plain, strict=True)) > 0.1
    assert packed.generate_until(prompts()) == lm(HFLM, apack_compile.restore(adapted)).generate_until(prompts())
    assert packed.counts.dense <= 1


def test_learned_prompts_are_not_left_out_of_a_score(model):
    tuned = disturbed(model, lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    packed = lm(PackedLM, tuned, preset="lossless", compile="none")
    with pytest.raises(ValueError, match="puts learned tokens before a prompt"):
        packed.loglikelihood(choices())


def test_mixed_precision_is_that_of_hflm(model):
    options = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"}
    full = lm(HFLM, model).loglikelihood(choices())
    dense = lm(HFLM, model, **options).loglikelihood(choices())
    packed = lm(PackedLM, model, preset="lossless", compile="none", **options).loglikelihood(choices())

    def distance(one, other):
        return max(abs(a[0] - b[0]) for a, b in zip(one, other, strict=True))

    assert distance(full, dense) > 1e-2
    assert distance(packed, dense) < 3 * distance(full, dense)
    assert distance(packed, full) > 1e-2


def test_a_batch_size_that_lm_eval_finds_scores_the_same(model):
    want = lm(HFLM, model)
    packed = lm(PackedLM, model, preset="lossless", compile="none", batch_size="auto", max_batch_size=4)
    close(packed.loglikelihood(choices()), want.loglikelihood(choices()), 5e-3)
    rolling = want.loglikelihood_rolling(documents())
    assert packed.loglikelihood_rolling(documents()) == pytest.approx(rolling, abs=2e-2)
    assert packed._loglikelihood_tokens([]) == []


@pytest.mark.parametrize("chunk_tokens", (0, 33, "8"))
def test_bad_chunks_are_named(model, chunk_tokens):
    with pytest.raises(ValueError, match=f"chunk_tokens={chunk_tokens!r} must be an integer from 1 to 32"):
        lm(PackedLM, model, chunk_tokens=chunk_tokens)


def test_settings_that_exclude_each_other_are_refused(model):
    with pytest.raises(ValueError, match="exclude each other"):
        lm(PackedLM, model, ratio=3, preset="lossless")


def write_task(folder: Path) -> dict:
    """A multiple-choice task of a file in the folder."""
    data = [{"question": context, "choices": ["abc", "xyz", "q"], "answer": 0} for context, _ in QUESTIONS[:3]]
    (folder / "data.json").write_text("\n".join(map(json.dumps, data)))
    return {
        "task": "tiny_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }


def test_lm_eval_runs_a_task(model, tmp_path):
    packed = lm(PackedLM, model, ratio=3, compile="none")
    tasks = TaskManager(include_defaults=False)
    results = simple_evaluate(packed, tasks=[write_task(tmp_path)], task_manager=tasks, bootstrap_iters=0)
    assert results["results"]["tiny_choices"]["acc,none"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert results["config"]["apack"]["requests_packed"] == 9


def test_the_model_is_registered():
    assert get_model("apack") is PackedLM


@pytest.mark.slow
def test_the_command_line_evaluates_a_model_from_a_folder(tmp_path):
    llama(192).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    task = write_task(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choices.yaml").write_text(json.dumps(task))
    command = f"""run --model apack --model_args pretrained={tmp_path / "model"},ratio=3,compile=none,max_length=192
        --tasks tiny_choices --include_path {tmp_path / "tasks"} --output_path {tmp_path / "out"} --device cpu --batch_size 2"""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "apack_compile.eval", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "9 of 9 requests were answered from packed keys and values" in done.stderr + done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["apack"]["requests_packed"] == 9
