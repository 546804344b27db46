"""Two processes share a model; each packs the cache of its own heads. Runs offline, on CPUs too: `make install` first, then

torchrun --nproc-per-node=2 examples/two_processes.py [FOLDER_OF_A_MODEL]

Without a folder it is a Llama with random weights: the demo's models have 3 KV heads, which two processes cannot share.
"""

import sys
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import apack_compile

TOKENS, NEW_TOKENS = 2_000, 16
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}

with TemporaryDirectory() as made:
    folder = sys.argv[1] if len(sys.argv) > 1 else made
    if folder == made:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, vocab_size=1_000, **SIZES)).save_pretrained(folder)
    # starts torch.distributed: gloo between CPUs, NCCL between GPUs
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))

# all ranks make the same calls, with the same inputs
prompt = torch.randint(3, 1_000, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
dense = model.generate(input_ids=prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
apack_compile.optimize(model, ratio=4)
apack_compile.calibrate(model, {"input_ids": prompt})
packed = model.generate(input_ids=prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
apack_compile.plan_for(model, TOKENS).save("both-ranks.plan")

report = apack_compile.report(model, all_ranks=True)
if torch.distributed.get_rank() == 0:
    same = int((packed == dense)[0, TOKENS:].sum())
    print(f"{same} of {NEW_TOKENS} tokens are those of a dense cache")
    print(report)
torch.distributed.destroy_process_group()
