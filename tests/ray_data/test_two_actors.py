"""A batch job on two of Ray's actors with a real small model; one of them is killed in the middle."""

import io
import os
import pickle
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: it has no wheel for this Python or machine")
pandas = pytest.importorskip("pandas")
pytest.importorskip("ray.data", reason="Ray Data is not installed")

import apack_compile
from apack_compile.demo import assets
from apack_compile.ray import Answers, BatchJob

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "batch_jobs.md"
PLACES = ("Paris", "Oslo", "Lima", "Cairo", "Delhi", "Rome")
PROMPTS = [f"{'Let me think about it. ' * (i % 5)}Someone who lives in {PLACES[i % 6]} lives in" for i in range(18)]
BATCH, KILLED_AT = 3, 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on two cores, with its files in a folder of its own, and nothing of it left behind."""
    # not pytest's folder: the names of Ray's sockets would be too long
    folder = tempfile.mkdtemp(prefix="ray")
    environment = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0", "CXX": "no-such-compiler"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init(
            num_cpus=2,
            object_store_memory=100_000_000,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # both actors load their model before the first batch
        context.wait_for_min_actors_s = 120
        # an error, where the test would wait for ever
        context.execution_no_progress_timeout_s = 300
        yield
        ray.shutdown()
        end = time.monotonic() + 20
        while running(folder) and time.monotonic() < end:
            time.sleep(0.2)
        left = running(folder)
        shutil.rmtree(folder)
        assert left == []


def running(folder: str) -> list[str]:
    """Command lines of processes that know Ray's folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if folder in line:
            lines.append(line)
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct with its tokenizer, and a plan, as a user has them."""
    from transformers import AutoModelForCausalLM

    try:
        source = assets._gguf_folder(None)
    except assets.DemoAssetsError as error:
        pytest.skip(str(error))
    tokenizer = assets.load_tokenizer()
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=assets.GGUF_NAME, local_files_only=True)
    # what was read from GGUF cannot be saved
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config).eval()
    model.load_state_dict(read.state_dict())
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    apack_compile.optimize(model, ratio=4, compile="none")
    apack_compile.calibrate(model, tokenizer(" ".join(PROMPTS), return_tensors="pt"))
    apack_compile.plan_for(model, 64).save(folder / "plan.safetensors")
    return folder


def test_no_row_is_lost_or_answered_twice_when_an_actor_is_killed(cluster, folder, tmp_path):
    marker = tmp_path / "killed"

    class Killed(Answers):
        """Ends its process once, with all answers of a batch in it made and none of them given back."""

        def __call__(self, batch):
            out = super().__call__(batch)
            if KILLED_AT in batch["id"] and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return out | {"process": np.full(len(batch["id"]), os.getpid())}

    plan = apack_compile.Plan.load(folder / "plan.safetensors")
    job = BatchJob(folder, plan=plan, settings={"compile": "none"}, max_new_tokens=6, key="id")
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows) // BATCH).map_batches(
        Killed,
        fn_constructor_args=(job,),
        batch_size=BATCH,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    found = answered.take_all()
    assert Counter(row["id"] for row in found) == Counter(range(len(PROMPTS)))
    assert all(row["prompt"] == PROMPTS[row["id"]] for row in found)
    killed, processes = int(marker.read_text()), {row["process"] for row in found}
    # the other actor, or the one in the place of the killed one
    assert processes - {killed}
    by_id = {row["id"]: row["answer"] for row in found}
    again = range(KILLED_AT - KILLED_AT % BATCH, KILLED_AT - KILLED_AT % BATCH + BATCH)
    batch = {"prompt": [PROMPTS[i] for i in again], "id": list(again)}
    assert Answers(job)(batch)["answer"].tolist() == [by_id[i] for i in again]
    assert all(by_id.values())


@pytest.mark.skipif(not PAGE.is_file(), reason="runs in a checkout only")
def test_the_guide_answers_a_table_with_pictures_and_names_what_not_to_pass(cluster, tmp_path):
    image = pytest.importorskip("PIL.Image")
    from small_vlm import save_small_vlm, small_vlm

    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    save_small_vlm(tmp_path / "model")
    model, processor = small_vlm()
    noise = np.random.default_rng(0).integers(0, 255, (5, 30, 40, 3), dtype=np.uint8)
    files = [io.BytesIO() for _ in noise]
    for picture, file in zip(noise, files, strict=True):
        image.fromarray(picture).save(file, "PNG")
    questions = [f"<image> {i}" for i in range(4)] + ["<image> <image> 7"]
    apack_compile.optimize(model, ratio=4, compile="none")
    apack_compile.calibrate(model, processor(images=image.open(files[0]), text=questions[0], return_tensors="pt"))
    apack_compile.plan_for(model, 260, vision_share=0.9).save(tmp_path / "plan.safetensors")
    table = {"question": questions, "picture": [file.getvalue() for file in files]}
    pandas.DataFrame(table).to_parquet(tmp_path / "questions.parquet")
    exec(block.replace("/data", str(tmp_path)), {})
    found = pandas.read_parquet(tmp_path / "answers").set_index("question")
    assert set(found.index) == set(questions)
    assert all(found.answer[questions[:4]]) and not any(found.error[questions[:4]])
    # a picture fewer than placeholders
    assert found.answer[questions[4]] == "" and found.error[questions[4]]
    # what the page says not to pass
    apack_compile.optimize(model, preset="lossless", compile="none")
    job = BatchJob(lambda: (model, processor))
    refused = ray.data.from_items([{"prompt": "5"}]).map_batches(Answers, fn_constructor_args=(job,), num_cpus=0.5)
    with pytest.raises(pickle.PicklingError) as caught:
        refused.take_all()
    first = str(caught.value).splitlines()[0]
    assert first.startswith("an optimized model cannot be pickled") and "pass the path of the model's folder" in first
