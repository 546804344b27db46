"""Run by torchrun, two processes: models that they share, then one model each. Argument: the folder with the models."""

import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import multi_section
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.distributed import DistributedConfig

import apack_compile
from apack_compile import AttentionPackConfig, Plan, PrefixStore
from apack_compile.plan.ranks import Ranks

FOLDER = Path(sys.argv[1])
# Tokens that are read from the cache where quality is measured.
NEWEST = 32
TEXT = {"input_ids": torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(0))}
PICTURES = multi_section.prompt([[40, 60, 200]])


def load(name: str, **options: Any) -> Any:
    kind = AutoModelForImageTextToText if name in ("qwen", "llava") else AutoModelForCausalLM
    return kind.from_pretrained(FOLDER / name, **options).eval()


def shared(name: str) -> Any:
    return load(name, tp_plan="auto")


def greedy(model: Any, inputs: Mapping[str, Tensor] = TEXT) -> Tensor:
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)


def pack(model: Any, inputs: Mapping[str, Tensor] = TEXT, ratio: float = 4, **options: Any) -> Any:
    config = {"compile": "none", "min_tokens": 0} | options
    apack_compile.optimize(model, AttentionPackConfig(ratio=ratio, **config))
    return apack_compile.calibrate(model, inputs)


def of_all_ranks(value: Any) -> list[Any]:
    found = [None, None]
    torch.distributed.all_gather_object(found, value)
    return found


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@torch.no_grad()
def log_probabilities(model: Any, inputs: Mapping[str, Tensor], cache: Any) -> Tensor:
    """Of the newest tokens `[n, V]`, read from a cache of the others."""
    read = {name: x[:, :-NEWEST] if x.shape == inputs["input_ids"].shape else x for name, x in inputs.items()}
    model(**read, past_key_values=cache)
    logits = model(input_ids=inputs["input_ids"][:, -NEWEST:], past_key_values=cache).logits
    return logits[0].double().log_softmax(-1)


def divergence(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """Mean KL of a packed cache from a dense one, in nats."""
    dense = log_probabilities(model, inputs, DynamicCache(config=model.config.get_text_config(decoder=True)))
    packed = log_probabilities(model, inputs, apack_compile.new_cache(model))
    return float((dense.exp() * (dense - packed)).sum(-1).mean())


def plan_file(name: str) -> None:
    """One file holds the plans of both ranks, and each loads its own."""
    model, path = shared(name), FOLDER / f"{name}.plan"
    pack(model, ratio=3)
    made = apack_compile.plan_for(model, 300)
    assert (made.ranks, made.signature[1]) == (Ranks(rank, 2), 1), (made.ranks, made.signature)
    expected = greedy(model)
    made.save(path)
    torch.distributed.barrier()
    loaded = Plan.load(path)
    assert loaded.ranks == made.ranks
    assert all(
        torch.equal(found.decoder, wanted.decoder)
        for layer in made.every_layer
        for found, wanted in zip(loaded.of_layer(layer).bases[layer], made.of_layer(layer).bases[layer], strict=True)
    )
    apack_compile.optimize(model, plan=loaded, compile="none")
    assert torch.equal(greedy(model), expected)
    report = apack_compile.report(model)
    assert f"rank {rank} of 2" in report.setting and {line.status for line in report.layers} == {"packed"}

    pack(model, ratio=3)
    plans = [made, *(apack_compile.plan_for(model, tokens) for tokens in (300, 5_000))]
    ids_here = [part.provenance.plan_id for plan in plans for part in plan.by_window.values()]
    ids_of_both = of_all_ranks(ids_here)
    assert ids_of_both[0] == ids_of_both[1] and None not in ids_here, ids_of_both
    assert len({plan.provenance.plan_id for plan in plans}) == 3, "plans of two calibrations, and of two lengths"
    if rank == 0:
        plans[1].save(path)
    torch.distributed.barrier()
    if rank == 0:
        assert Plan.load(path).provenance.plan_id == plans[1].provenance.plan_id
    else:
        assert "holds the ranks [0] of 2, not 1" in refusal(lambda: Plan.load(path))


def generates(name: str, inputs: Mapping[str, Tensor], lossless: tuple[str, ...], lossy: tuple[str, ...]) -> None:
    """Tokens of a shared model: lossless those of its dense cache, lossy the same on all ranks and as good as one process gives."""
    model, alone = shared(name), load(name)
    dense = greedy(model, inputs)
    assert torch.equal(dense, greedy(alone, inputs))
    for compile in lossless:
        apack_compile.optimize(model, preset="lossless", compile=compile)
        assert torch.equal(greedy(model, inputs), dense), compile
    found = []
    for compile in lossy:
        pack(model, inputs, compile=compile)
        found.append(greedy(model, inputs))
        report = apack_compile.report(model)
        wanted = "packed" if compile == "none" else "rewritten"
        assert {line.status for line in report.layers} == {wanted} and report.bytes["ratio"] > 3.8, str(report)
        assert not report.notes, report.notes
    both = of_all_ranks(torch.cat(found))
    assert torch.equal(*both) and len(both[0].unique(dim=0)) == 1, both

    # a rank's bases are those of its heads in one process where two groups of heads have bases; how many rows are used differs
    pack(alone, inputs, head_groups=2)
    here, there = (apack_compile.plan_for(one, 300, 0.1).bases[0] for one in (model, alone))
    for mine, both_groups in zip(here, there, strict=True):
        rows = min(mine.decoder.shape[2], both_groups.decoder.shape[2])
        found, wanted = mine.decoder[0, 0, :rows], both_groups.decoder[0, rank, :rows]
        torch.testing.assert_close(found.abs(), wanted.abs(), rtol=1e-2, atol=1e-3)
    kl, kl_alone = divergence(model, inputs), divergence(alone, inputs)
    assert 0 < kl < 2 * kl_alone, (kl, kl_alone)
    assert of_all_ranks(kl) == [kl, kl]

    for one in (model, alone):
        greedy(one, inputs)
    report_of_both(model, apack_compile.report(alone))


def report_of_both(model: Any, of_one: Any) -> None:
    """One call gives the reports of both ranks, whose dense bytes together are those of the model in one process."""
    report, own = apack_compile.report(model, all_ranks=True), apack_compile.report(model)
    assert len(report.reports) == 2 and report.reports[rank] == own
    assert report.bytes["dense_bytes"] == of_one.bytes["dense_bytes"] == 2 * own.bytes["dense_bytes"]
    assert report.bytes["sequence_bytes"] == sum(one.bytes["sequence_bytes"] for one in report.reports)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["rank", "0", "1", "all"], lines
    assert f"rank {rank} of 2" in lines[5 + rank] and report.to_dict() == of_all_ranks(report.to_dict())[0]


def first_request_and_presets() -> None:
    """What each rank finds out by itself on the way does not part the ranks."""
    model = shared("llama")
    for options in ({"ratio": 4}, {"preset": "attentionpack"}, {"preset": "a-vl"}, {"preset": "snapkv"}):
        apack_compile.optimize(model, **options, compile="none", min_tokens=0)
        both = of_all_ranks(greedy(model))
        assert torch.equal(*both), options


def ranks_agree_on_rotation() -> None:
    """Where the keys of one rank do not rotate, those of no rank are rotated back: it decides how many passes calibration takes."""
    model = shared("qwen")
    if rank == 1:
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.register_forward_hook(
                lambda module, args, keys: keys * torch.linspace(1, 2, keys.shape[1])[:, None]
            )
    said = apack_compile.report(pack(model, PICTURES)).keys
    assert said.startswith("stored as they are: " + ("they" if rank else "those of another rank") + " do not rotate"), (
        said
    )


def prefixes() -> None:
    """Each rank keeps its part of a prefix in a file of its own; what one has to read anew, both read."""
    model, questions = pack(shared("llama")), torch.tensor([[5, 6, 7], [8, 9, 10]])
    prefix = apack_compile.read(model, **TEXT)
    expected = prefix.generate(questions, max_new_tokens=4, do_sample=False)
    prefix.save(FOLDER / f"prefix{rank}")
    torch.distributed.barrier()
    own, other = (FOLDER / f"prefix{i}" for i in (rank, 1 - rank))
    said = refusal(lambda: apack_compile.load_prefix(model, other))
    assert f"read on 'rank {1 - rank} of 2' of tensor parallelism; this is rank {rank} of 2" in said, said
    store = PrefixStore(FOLDER / "store", 2**30)
    for again in (apack_compile.load_prefix(model, own), *(store.read(model, **TEXT) for _ in range(2))):
        assert torch.equal(again.generate(questions, max_new_tokens=4, do_sample=False), expected)
    torch.distributed.barrier()
    files = sorted((FOLDER / "store").glob("*.prefix"))
    assert len(files) == 2
    torch.distributed.barrier()
    if rank == 0:
        files[0].unlink()
    torch.distributed.barrier()
    assert torch.equal(store.read(model, **TEXT).generate(questions, max_new_tokens=4, do_sample=False), expected)


def heads_of_a_rank() -> None:
    """A rank has its share of the heads, or all of them where the plan gathers what projections give; half heads are refused."""
    # LLaVA's vision tower has projections of the same name
    for name, heads in (("llava", 1), ("gathers", 4)):
        model = pack(shared(name))
        assert apack_compile.plan_for(model, 300).signature[1] == heads, name
        cache = model(**TEXT, use_cache=True).past_key_values
        assert cache.layers[0].keys.shape[1] == heads, name
    said = refusal(lambda: apack_compile.optimize(shared("three heads"), ratio=4))
    assert (
        "2 ranks cannot share the 3 heads of layer 0" in said and "start a number of processes that divides 3" in said
    )
    said = refusal(lambda: apack_compile.optimize(shared("llama"), ratio=4, quantize="int8wo"))
    assert "several processes share the weights; load them quantized" in said


def other_ways_to_share() -> None:
    """Weights that FSDP shares are whole where they are used; layers that are spread over processes are refused."""
    model = load("llama", distributed_config=DistributedConfig(fsdp_size=2))
    tokens = greedy(pack(model))
    assert torch.equal(tokens, greedy(pack(load("llama"))))
    prefix = apack_compile.read(model, **TEXT)
    if rank == 0:
        prefix.save(FOLDER / "prefix of both")
    torch.distributed.barrier()
    assert apack_compile.load_prefix(model, FOLDER / "prefix of both").length == 300
    model = load("llama", distributed_config=DistributedConfig(pp_size=2))
    said = refusal(lambda: apack_compile.optimize(model, ratio=4))
    assert "its layers are spread over 2 processes (pp_size=2)" in said and "with tp_size=2" in said


def replicas() -> None:
    """A model each, in DistributedDataParallel, optimized before that or after it."""
    inputs = {"input_ids": TEXT["input_ids"].roll(rank)}
    expected = pack(load("llama"), inputs)
    tokens = greedy(expected, inputs)
    wrapped = DistributedDataParallel(load("llama"))
    for replica in (wrapped, DistributedDataParallel(expected)):
        pack(replica, inputs)
        assert torch.equal(greedy(replica.module, inputs), tokens)
    report = apack_compile.report(wrapped, all_ranks=True)
    assert len(report.reports) == 2 and report.reports[rank] == apack_compile.report(wrapped)
    with torch.no_grad():
        cache = apack_compile.new_cache(wrapped)
        wrapped(**inputs, past_key_values=cache)
    assert int(cache.get_seq_length()) == 300
    # a step of training goes on, without a cache
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = wrapped.module.model.layers[0].self_attn.k_proj.weight.grad
    assert torch.equal(*of_all_ranks(gradient)) and gradient.any()
    # one plan for all replicas
    path = FOLDER / "replicas.plan"
    if rank == 0:
        apack_compile.plan_for(wrapped, 300).save(path)
    torch.distributed.barrier()
    apack_compile.optimize(wrapped, plan=Plan.load(path), compile="none")
    assert torch.equal(*of_all_ranks(greedy(wrapped.module)))
    assert "generate" not in vars(apack_compile.restore(wrapped).module)


# a rank that waits for the other for ever ends
signal.alarm(300)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for name in ("full", "one full"):
    plan_file(name)
# each graph takes seconds
generates("llama", TEXT, lossless=("none", "eager"), lossy=("none", "auto"))
generates("qwen", PICTURES, lossless=("none",), lossy=("none", "eager"))
first_request_and_presets()
ranks_agree_on_rotation()
prefixes()
heads_of_a_rank()
other_ways_to_share()
replicas()
torch.distributed.destroy_process_group()
