"""Small decoders whose modules own their KV cache buffers, and runs of their programs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apack_compile import Plan
from apack_compile.plan.presets.lossless import lossless_plan

VOCABULARY, HEADS, KV_HEADS, WIDTH = 50, 4, 2, 16
Update = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def setitem(cache: nn.Module, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    cache.keys[:, :, at] = k
    cache.values[:, :, at] = v
    return cache.keys, cache.values


def index_copy(cache: nn.Module, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    return cache.keys.index_copy_(2, at, k), cache.values.index_copy_(2, at, v)


def functional(cache: nn.Module, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.ops.aten.index_put.default(cache.keys, [None, None, at], k)
    values = torch.index_copy(cache.values, 2, at, v)
    cache.keys.copy_(keys)
    cache.values.copy_(values)
    return keys, values


def slices(cache: nn.Module, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    start, new = at[0].item(), k.shape[2]
    torch._check(start >= 0)
    torch._check(start + new <= cache.keys.shape[2])
    cache.keys.narrow(2, start, new).copy_(k)
    cache.values[:, :, start : start + new] = v
    return cache.keys, cache.values


def tokens_first(cache: nn.Module, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Buffers `[B, T, H_kv, D]`."""
    cache.keys.index_copy_(1, at, k.transpose(1, 2))
    cache.values[:, at] = v.transpose(1, 2)
    return cache.keys.transpose(1, 2), cache.values.transpose(1, 2)


def keys_read_first(cache: nn.Module, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are read, and heads repeated, before values are written."""
    cache.keys.index_copy_(2, at, k)
    keys = cache.keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
    cache.values.index_copy_(2, at, v)
    return keys, cache.values


UPDATES: dict[str, Update] = {
    update.__name__: update for update in (setitem, index_copy, functional, slices, tokens_first, keys_read_first)
}


class Cache(nn.Module):
    """Buffers of one layer, written by `update`."""

    def __init__(self, batch: int, tokens: int, update: Update) -> None:
        super().__init__()
        self.update = update
        size = (batch, tokens, KV_HEADS, WIDTH) if update is tokens_first else (batch, KV_HEADS, tokens, WIDTH)
        self.register_buffer("keys", torch.zeros(size))
        self.register_buffer("values", torch.zeros(size))


class Layer(nn.Module):
    """Attention with a cache and grouped queries, in one of two spellings."""

    def __init__(self, batch: int, tokens: int, update: Update, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.qkv = nn.Linear(HEADS * WIDTH, (HEADS + 2 * KV_HEADS) * WIDTH, bias=False)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH, bias=False)
        self.cache = Cache(batch, tokens, update)

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
        k, v = self.cache.update(self.cache, k, v, input_pos)
        if self.cache.update is not keys_read_first:
            k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        if self.spelling == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.transpose(2, 3)) * WIDTH**-0.5
            y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return self.out(y.transpose(1, 2).contiguous().flatten(2))


class Decoder(nn.Module):
    """Token ids `[B, n]` and positions `[n]` to logits `[B, n, vocabulary]`."""

    def __init__(
        self,
        updates: Sequence[Update] = (setitem, setitem),
        *,
        tokens: int = 64,
        batch: int = 1,
        spelling: str = "sdpa",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, HEADS * WIDTH)
        self.positions = nn.Embedding(tokens, HEADS * WIDTH)
        self.layers = nn.ModuleList(Layer(batch, tokens, update, spelling) for update in updates)
        self.norm = nn.LayerNorm(HEADS * WIDTH)
        self.register_buffer("causal", torch.ones(tokens, tokens, dtype=torch.bool).tril(), persistent=False)
        self.to(dtype).eval()

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal[None, None, input_pos]
        x = self.embedding(ids) + self.positions(input_pos)
        for layer in self.layers:
            x = x + layer(self.norm(x), mask, input_pos)
        return x @ self.embedding.weight.T


def exported(model: Decoder, dynamic: bool = True) -> torch.export.ExportedProgram:
    """A decoder as a program, of any number of tokens or of one."""
    batch, tokens = model.layers[0].cache.keys.shape[0], len(model.causal)
    count = 5 if dynamic else 1
    sizes = torch.export.Dim("n", max=tokens - 1)
    inputs = torch.zeros(batch, count, dtype=torch.int64), torch.arange(count)
    return torch.export.export(model, inputs, dynamic_shapes=({1: sizes}, {0: sizes}) if dynamic else None)


def token_ids(tokens: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Random prompts."""
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def run(program: Any, ids: Tensor, chunks: Sequence[int]) -> Tensor:
    """Logits of a new sequence that is given in chunks."""
    module = program.module() if isinstance(program, torch.export.ExportedProgram) else program
    start, logits = 0, []
    with torch.no_grad():
        for count in chunks:
            logits.append(module(ids[:, start : start + count], torch.arange(start, start + count)))
            start += count
    return torch.cat(logits, dim=1)


def dense_plan(layers: int = 2, tail_slots: int = 0, dtype: torch.dtype = torch.float64) -> Plan:
    """A plan that keeps every token as it is."""
    plan = lossless_plan(range(layers))
    return replace(plan, tail_slots=tail_slots, signature=(layers, KV_HEADS, WIDTH, str(dtype)))
