"""A tiny Llama, a tokenizer of single characters, and what a dense forward pass says of a row."""

import string
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from apack_compile.scoring import Row

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = list(string.ascii_lowercase + string.digits + " .,\n")
VOCABULARY = len(SPECIAL) + len(CHARACTERS)


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    **dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True)),
}


def llama(max_length: int = 512, **options: Any) -> LlamaForCausalLM:
    """Three layers of six query and two KV heads; random weights, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": max_length} | options)
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    """Positions are learned: those of a padded row must be its own."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=512, n_embd=48, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def gemma3() -> Any:
    """A sliding layer before two full ones."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=16, layer_types=layers)).eval()


def lfm2() -> Any:
    """A short convolution before two attentions."""
    torch.manual_seed(0)
    layers = ["conv", "full_attention", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=layers)).eval()


def jamba() -> Any:
    """A selective scan, which begins anew with every chunk of several tokens, before an attention."""
    torch.manual_seed(0)
    shape = {name: x for name, x in SHAPE.items() if name != "head_dim"}
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    layers = {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1}
    return JambaForCausalLM(JambaConfig(**shape, **mamba, **layers)).eval()


def qwen3_next() -> Any:
    """Linear attentions around a full one."""
    torch.manual_seed(0)
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **linear, **experts)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=characters, clean_up_tokenization_spaces=False, **names)


def text(length: int, seed: int) -> str:
    """Random words."""
    generator = torch.Generator().manual_seed(seed)
    return "".join(CHARACTERS[i] for i in torch.randint(len(CHARACTERS) - 3, (length,), generator=generator).tolist())


def tokens(length: int, seed: int) -> tuple[int, ...]:
    """Random tokens, none special."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist())


@torch.no_grad()
def dense_scores(model: Any, row: Row) -> list[tuple[float, bool]]:
    """Summed log-probability and greediness of each of a row's targets, without a cache."""
    logits = model(torch.tensor([row.tokens])).logits[0, -len(row.inputs) :].log_softmax(-1)
    targets = torch.tensor(row.targets)
    found = logits.gather(1, targets.T).sum(0)
    return list(zip(found.tolist(), (logits.argmax(-1) == targets).all(1).tolist(), strict=True))
