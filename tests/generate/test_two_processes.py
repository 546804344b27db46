"""Two processes that share a model (tensor parallelism), or have one each: tests/support/two_ranks.py has what they check."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import multi_section
import pytest
import torch
import vlms
from saved_plans import llama, windowed
from transformers import Olmo2Config, Olmo2ForCausalLM

import apack_compile
from apack_compile import GraphLog, Plan, RanksReport

SUPPORT = Path(__file__).parents[1] / "support"
SEVERAL_HEADS = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.1}
LAUNCH = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
def test_two_processes_share_models_or_have_one_each(tmp_path):
    models = {
        "full": llama(),
        "one full": windowed("one full"),
        "llama": llama(**SEVERAL_HEADS),
        "three heads": llama(hidden_size=96, num_attention_heads=6, num_key_value_heads=3),
        "qwen": multi_section.build("qwen2_5_vl", heads=8, kv_heads=4, spread=0.1),
        "llava": vlms.build("llava")[0],
        # its plan gathers keys, which are normalised over all heads
        "gathers": Olmo2ForCausalLM(Olmo2Config(**llama(**SEVERAL_HEADS).config.to_dict())),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(
        [*LAUNCH, str(SUPPORT / "two_ranks.py"), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    for name in ("full", "one full"):
        with pytest.raises(ValueError, match=r"made on 2 ranks of tensor parallelism; load it where as many share"):
            Plan.load(tmp_path / f"{name}.plan")


def test_a_report_of_all_ranks_adds_bytes_up_and_says_which_rank_notes_something():
    model = apack_compile.optimize(llama(), preset="lossless", compile="none")
    alone = apack_compile.report(model, all_ranks=True)
    assert alone.reports == (apack_compile.report(model),) and alone.bytes is None and "1 rank" in repr(alone)
    assert str(alone).splitlines()[2].split() == ["0", f"{alone.reports[0].weight_bytes:,}", "2", "of", "2"]
    model.generate(torch.randint(10, 64, (1, 40)), max_new_tokens=4, do_sample=False)
    one = replace(apack_compile.report(model), notes=("everywhere", "here"))
    report = RanksReport((replace(one, notes=("everywhere",)), one))
    assert report.bytes["sequence_bytes"] == 2 * one.bytes["sequence_bytes"]
    assert report.bytes["ratio"] == pytest.approx(one.bytes["ratio"])
    assert report.notes == {"everywhere": (0, 1), "here": (1,)}
    assert str(report).splitlines()[-2:] == ["note, every rank: everywhere", "note, rank 1: here"]
    with pytest.raises(ValueError, match=r"^all_ranks: is for models"):
        apack_compile.report(GraphLog(), all_ranks=True)
