"""Run by torchrun, two processes: a model that they share, and one plan file of both. Arguments: the model's folder, the plan file."""

import sys

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

import apack_compile
from apack_compile import AttentionPackConfig, Plan
from apack_compile.plan.ranks import Ranks

folder, path = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
rank = torch.distributed.get_rank()
ids = torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(0))


def greedy() -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)


dense = greedy()
apack_compile.optimize(model, preset="lossless", compile="none")
assert torch.equal(greedy(), dense)
apack_compile.optimize(model, AttentionPackConfig(ratio=3, compile="none", min_tokens=0))
apack_compile.calibrate(model, {"input_ids": ids})
made = apack_compile.plan_for(model, 300)
assert (made.ranks, made.signature[1]) == (Ranks(rank, 2), 1), (made.ranks, made.signature)
expected = greedy()
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
assert torch.equal(greedy(), expected)
report = apack_compile.report(model)
assert f"rank {rank} of 2" in report.setting and {line.status for line in report.layers} == {"packed"}

apack_compile.optimize(model, AttentionPackConfig(ratio=3, compile="none", min_tokens=0))
apack_compile.calibrate(model, {"input_ids": ids})
plans = [made, *(apack_compile.plan_for(model, tokens) for tokens in (300, 5_000))]
ids_here = [part.provenance.plan_id for plan in plans for part in plan.by_window.values()]
ids_of_both = [None, None]
torch.distributed.all_gather_object(ids_of_both, ids_here)
assert ids_of_both[0] == ids_of_both[1] and None not in ids_here, ids_of_both
assert len({plan.provenance.plan_id for plan in plans}) == 3, "plans of two calibrations, and of two lengths"
if rank == 0:
    plans[1].save(path)
torch.distributed.barrier()
try:
    found = Plan.load(path).provenance.plan_id
except ValueError as error:
    found = str(error)
assert found == plans[1].provenance.plan_id if rank == 0 else "holds the ranks [0] of 2, not 1" in found, found
torch.distributed.destroy_process_group()
