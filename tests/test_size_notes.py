"""A cache that holds more than a dense one would is noted, whatever it was asked to be."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile.cache.accounting import less_than_asked, more_than_dense
from apack_compile.kernels import native


def llama(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def report_of(model, tokens: int, **setting):
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    apack_compile.optimize(model, compile="none", **setting)
    if "ratio" in setting:
        apack_compile.calibrate(model, {"input_ids": torch.randint(3, 90, (1, 600))})
    model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    return apack_compile.report(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "setting", [{"preset": "lossless"}, {"preset": "attentionpack"}, {"ratio": 2, "min_tokens": 0}], ids=str
)
def test_more_bytes_than_a_dense_cache_are_noted(setting, dtype):
    report = report_of(llama(dtype), 6 if "ratio" in setting else 60, **setting)
    held = report.bytes
    assert held["sequence_bytes"] > held["dense_bytes"]
    (note,) = report.notes
    assert f"{held['sequence_bytes']:,} bytes instead of {held['dense_bytes']:,}" in note
    assert ("in torch.float32" in note) == (dtype == torch.float32)
    assert f"a dense one has {2 * held['dense_bytes']:,}" in note or dtype != torch.float32
    assert sum(held["parts"].values()) == held["sequence_bytes"]
    assert max(held["parts"], key=held["parts"].get) in note


def test_a_plan_of_ones_own_is_no_exception():
    model = llama()
    report_of(model, 60, preset="lossless")
    plan = apack_compile.plan_for(model, 60)
    (note,) = report_of(model, 60, plan=plan).notes
    assert note.startswith("holds more than a 16-bit dense cache")


def test_what_is_lost_without_compiled_operations_is_said(monkeypatch: pytest.MonkeyPatch):
    model = apack_compile.optimize(llama(), preset="lossless", compile="none")
    for compiled, said in ((object(), False), (None, True)):
        monkeypatch.setattr(native, "COMPILED", compiled)
        assert ("results are the same, packing and attention are slower" in str(apack_compile.report(model))) == said


def test_fewer_bytes_than_a_dense_cache_are_not():
    report = report_of(llama(), 900, ratio=4)
    assert report.bytes["ratio"] > 3
    assert not any("more than" in note for note in report.notes)


def test_what_is_held_beside_packed_tokens_is_named_where_it_costs_the_ratio():
    report = report_of(llama(), 90, ratio=4, min_tokens=0)
    held = report.bytes
    beside = {name: size for name, size in held["parts"].items() if name != "packed tokens and free slots"}
    assert held["ratio"] < 0.95 * 4
    (note,) = (note for note in report.notes if note.startswith("holds "))
    assert note.startswith(f"holds {held['ratio']:.2f}x, not 4x, at {held['tokens']} tokens: ")
    largest = max(beside, key=beside.get)
    assert f"{beside[largest] / held['sequence_bytes']:.0%} {largest}" in note


def test_refitted_bases_are_named_where_they_cost_the_ratio():
    held = {"ratio": 3.0, "tokens": 90, "sequence_bytes": 1000}
    held["parts"] = {"packed tokens and free slots": 500, "bases of these sequences": 400, "positions": 100}
    assert less_than_asked(4, held) == "holds 3.00x, not 4x, at 90 tokens: 40% bases of these sequences, 10% positions"
    assert less_than_asked(3.1, held) is None


def test_the_largest_parts_are_named():
    assert more_than_dense(100, 100) is None
    assert more_than_dense(200, 100) == "holds more than a 16-bit dense cache: 200 bytes instead of 100"
    said = more_than_dense(2000, 1000, {"codes": 400, "bases": 1000, "tiers": 600, "kept": 0})
    assert said == "holds more than a 16-bit dense cache: 2,000 bytes instead of 1,000; 50% bases, 30% tiers"
