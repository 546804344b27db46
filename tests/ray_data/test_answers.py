"""A batch job without Ray: answers are those of each prompt alone, groups keep to their limits, bad rows are named."""

import io
import pickle

import numpy as np
import pytest
import torch
from tiny_llama import llama, text, tokenizer

import apack_compile
from apack_compile.ray import Answers, BatchJob

LENGTHS = (41, 300, 7, 290, 123, 41, 295, 130, 3)
PROMPTS = [text(length, seed) for seed, length in enumerate(LENGTHS)]
EXACT = {"preset": "lossless", "settings": {"compile": "none"}, "max_new_tokens": 9}


def tiny() -> tuple:
    """A model that never ends by itself, and its tokenizer."""
    model = llama()
    model.generation_config.eos_token_id = None
    return model, tokenizer()


def alone(prompt: str, new_tokens: int = 9) -> str:
    """What the dense model answers."""
    model, words = tiny()
    ids = words(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def watched(answers: Answers) -> list[tuple[int, ...]]:
    """Shapes of the prompts that the model reads from now on."""
    shapes: list[tuple[int, ...]] = []

    def note(_, args, kwargs) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            shapes.append(tuple(kwargs["input_ids"].shape))

    answers.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> str:
    model, words = tiny()
    apack_compile.optimize(model, ratio=3, compile="none")
    apack_compile.calibrate(model, {"input_ids": words(text(400, 90), return_tensors="pt").input_ids})
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    apack_compile.plan_for(model, 300).save(path)
    return str(path)


def test_every_row_gets_the_answer_that_it_gets_alone():
    answers = Answers(BatchJob(tiny, **EXACT))
    batch = {"prompt": np.array(PROMPTS, dtype=object), "id": np.arange(len(PROMPTS))}
    out = answers(batch)
    assert out["answer"].tolist() == [alone(prompt) for prompt in PROMPTS]
    assert out["id"].tolist() == list(range(len(PROMPTS))) and out["prompt"].tolist() == PROMPTS
    assert set(batch) == {"prompt", "id"}


def test_rows_of_similar_length_are_generated_together_up_to_the_limit():
    answers = Answers(BatchJob(tiny, max_tokens=2 * (300 + 9), **EXACT))
    shapes = watched(answers)
    answers({"prompt": PROMPTS})
    assert shapes == [(2, 300), (1, 290), (2, 130), (4, 41)]


def test_a_row_over_the_limit_runs_alone():
    answers = Answers(BatchJob(tiny, max_tokens=20, **EXACT))
    shapes = watched(answers)
    assert answers({"prompt": PROMPTS[:2]})["answer"].tolist() == [alone(prompt) for prompt in PROMPTS[:2]]
    assert shapes == [(1, 300), (1, 41)]


def test_a_group_takes_no_more_bytes_than_its_budget(plan):
    job = BatchJob(tiny, plan=plan, settings={"compile": "none"}, max_new_tokens=9, budget_bytes=200_000)
    answers = Answers(job)
    most = apack_compile.largest_batch(answers.model, 309, job.budget_bytes)
    shapes, prompts = watched(answers), [text(300, seed) for seed in range(2 * most + 1)]
    answers({"prompt": prompts})
    assert most > 1 and shapes == [(most, 300), (most, 300), (1, 300)]
    report = apack_compile.report(answers.model)
    assert report.bytes["ratio"] > 1.5


def test_a_row_over_the_budget_is_named(plan):
    job = BatchJob(tiny, plan=plan, settings={"compile": "none"}, max_new_tokens=9, budget_bytes=30_000, error="error")
    out = Answers(job)({"prompt": [text(20, 1), text(450, 2)]})
    assert out["error"][0] == "" and len(out["answer"][0]) == 9
    assert out["error"][1] == "a cache of its 459 tokens takes more than budget_bytes=30000" and out["answer"][1] == ""


def test_rows_that_cannot_be_read_are_named():
    answers = Answers(BatchJob(tiny, **EXACT))
    batch = {"prompt": ["abc", None, "", 4.5], "name": ["a", "b", "c", "d"]}
    with pytest.raises(
        ValueError, match=r"row 1 of the batch: the prompt is None, no string; row 2 .* no tokens; row 3"
    ):
        answers(batch)
    by_name = Answers(BatchJob(tiny, key="name", **EXACT))
    with pytest.raises(
        ValueError, match=r"^row b: the prompt is None, no string; row c: the prompt has no tokens; row d"
    ):
        by_name(batch)
    with_column = Answers(BatchJob(tiny, error="problem", **EXACT))
    out = with_column(batch)
    assert out["answer"].tolist() == [alone("abc"), "", "", ""]
    assert out["problem"].tolist()[:3] == ["", "the prompt is None, no string", "the prompt has no tokens"]


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"no column 'prompt' in the dataset; it has 'question', 'id'"):
        Answers(BatchJob(tiny, **EXACT))({"question": ["a"], "id": [1]})


def test_a_chat_template_is_put_around_prompts():
    def chatty() -> tuple:
        model, words = tiny()
        words.chat_template = "{% for m in messages %}user {{ m['content'] }}{% endfor %}."
        return model, words

    out = Answers(BatchJob(chatty, chat=True, **EXACT))({"prompt": ["where", "who goes"]})
    assert out["answer"].tolist() == [alone("user where."), alone("user who goes.")]


def test_a_folder_with_pictures_is_loaded_and_answered(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from small_vlm import save_small_vlm

    save_small_vlm(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 50, 3), dtype=np.uint8)
    file = io.BytesIO()
    image.fromarray(noise[2]).save(file, "PNG")
    cells = np.empty(4, dtype=object)
    cells[:] = [noise[0], [noise[1], noise[2]], None, file.getvalue()]
    prompts = ["<image> 5 6", "7 <image> 8 <image> 9", "10 11 12", "<image> 13"]
    answers = Answers(BatchJob(tmp_path, pictures="picture", **EXACT))
    out = answers({"prompt": prompts, "picture": cells})["answer"].tolist()
    singly = [answers({"prompt": [prompts[i]], "picture": cells[i : i + 1]})["answer"][0] for i in range(4)]
    assert out == singly and all(out) and len(set(out)) > 1


def test_a_model_that_its_function_optimized_is_taken_as_it_is():
    def optimized() -> tuple:
        model, words = tiny()
        return apack_compile.optimize(model, preset="lossless", compile="none"), words

    answers = Answers(BatchJob(optimized, max_new_tokens=5))
    assert apack_compile.report(answers.model).setting == "preset='lossless'"


def test_a_plan_is_given_as_an_object_or_as_a_path(plan):
    options = {"settings": {"compile": "none"}, "max_new_tokens": 9}
    by_path = BatchJob(tiny, plan=plan, **options)
    by_object = pickle.loads(pickle.dumps(BatchJob(tiny, plan=apack_compile.Plan.load(plan), **options)))
    batch = {"prompt": PROMPTS[:4]}
    assert Answers(by_path)(batch)["answer"].tolist() == Answers(by_object)(batch)["answer"].tolist()


def test_a_model_object_is_refused_and_the_error_begins_with_what_to_pass():
    model = tiny()[0]
    for given in (model, apack_compile.optimize(model, preset="lossless"), (model, tokenizer())):
        with pytest.raises(
            TypeError, match=r"^model: pass the path of its folder, or a function .*, not a (LlamaFor|tuple)"
        ):
            BatchJob(given)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"plan": 4}, "plan=4 must be a Plan, or the path of a saved one"),
        ({"plan": "p", "ratio": 4}, "plan and ratio=4 exclude each other"),
        ({"ratio": 4, "preset": "lossless"}, "ratio=4 and preset='lossless' exclude each other"),
        ({"ratio": 0.5}, "ratio=0.5 must be a finite number > 1"),
        ({"settings": {"plan": "p"}}, "settings: plan: has"),
        ({"settings": {"compile": "fast"}}, "compile='fast' is not one of"),
        ({"settings": {"config": 3}}, "config=3 must be an AttentionPackConfig"),
        ({"settings": {"config": apack_compile.AttentionPackConfig()}, "ratio": 4}, "a config says all"),
        ({"prompt": None}, "prompt=None must be the name of a column"),
        ({"max_tokens": 0}, "max_tokens=0 must be an integer >= 1"),
        ({"max_new_tokens": None}, "max_new_tokens=None must be an integer >= 1"),
        ({"budget_bytes": 10_000}, "budget_bytes: what a cache takes is known from a plan"),
        ({"generate": {"num_return_sequences": 2}}, "leave num_return_sequences out"),
    ],
)
def test_a_wrong_value_is_refused_where_the_job_is_written_down(wrong, message):
    with pytest.raises(ValueError, match=message):
        BatchJob("path/to/model", **wrong)


def test_what_a_function_must_return_is_said():
    with pytest.raises(ValueError, match=r"the function gave int; it must return \(model, tokenizer or processor\)"):
        Answers(BatchJob(lambda: 3))
    with pytest.raises(ValueError, match="the model came with a tokenizer alone"):
        Answers(BatchJob(tiny, pictures="picture", **EXACT))
