"""A tiny Llama, a tokenizer of single characters, and what a dense forward pass says of a row."""

import string
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apack_compile.scoring import Row

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = list(string.ascii_lowercase + string.digits + " .,\n")
VOCABULARY = len(SPECIAL) + len(CHARACTERS)


def llama(max_length: int = 512, **options: Any) -> LlamaForCausalLM:
    """Three layers of six query and two KV heads; random weights, always the same."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": max_length,
        "initializer_range": 0.2,
        **dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True)),
    }
    config = LlamaConfig(**shape | options)
    return LlamaForCausalLM(config).eval()


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
