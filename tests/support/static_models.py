"""Decoders whose modules own static key and value buffers, as gpt-fast's do."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 4, 2, 16, 48, 50


def setitem(buffer: Tensor, at: Tensor, new: Tensor, start: int) -> Tensor:
    buffer[:, :, at] = new
    return buffer


def index_put(buffer: Tensor, at: Tensor, new: Tensor, start: int) -> Tensor:
    return torch.ops.aten.index_put_(buffer, [None, None, at], new)


def index_copy(buffer: Tensor, at: Tensor, new: Tensor, start: int) -> Tensor:
    buffer.index_copy_(2, at, new)
    return buffer


def put_back(buffer: Tensor, at: Tensor, new: Tensor, start: int) -> Tensor:
    """Not in place, then copied back."""
    filled = buffer.index_copy(2, at, new)
    buffer.copy_(filled)
    return filled


def slices(buffer: Tensor, at: Tensor, new: Tensor, start: int) -> Tensor:
    buffer[:, :, start : start + new.shape[2]] = new
    return buffer


def tokens_first(buffer: Tensor, at: Tensor, new: Tensor, start: int) -> Tensor:
    """A buffer `[B, T, H_kv, D]`."""
    buffer[:, at] = new.transpose(1, 2)
    return buffer.transpose(1, 2)


def tokens_first_narrowed(buffer: Tensor, at: Tensor, new: Tensor, start: int) -> Tensor:
    """A slice of a buffer `[B, T, H_kv, D]`, through its transpose."""
    heads_first = buffer.transpose(1, 2)
    heads_first.narrow(2, start, new.shape[2]).copy_(new)
    return heads_first


Update = Callable[[Tensor, Tensor, Tensor, int], Tensor]
UPDATES: dict[str, Update] = {
    update.__name__: update
    for update in (setitem, index_put, index_copy, put_back, slices, tokens_first, tokens_first_narrowed)
}


class Attention(nn.Module):
    def __init__(self, batch: int, max_len: int, update: str):
        super().__init__()
        self.update = UPDATES[update]
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        size = (max_len, KV_HEADS) if update.startswith("tokens_first") else (KV_HEADS, max_len)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch, *size, HEAD_DIM))

    def forward(self, x: Tensor, mask: Tensor, at: Tensor, start: int) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        keys, values = self.update(self.k_cache, at, key, start), self.update(self.v_cache, at, value, start)
        keys, values = (states.repeat_interleave(HEADS // KV_HEADS, dim=1) for states in (keys, values))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class StaticModel(nn.Module):
    """Logits `[B, n, vocabulary]` of tokens `[B, n]` that are written at the positions `at` `[n]`, from `start` on."""

    def __init__(self, max_len: int = 192, batch: int = 1, layers: int = 2, update: str = "setitem", seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Attention(batch, max_len, update) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("causal", torch.ones(max_len, max_len, dtype=torch.bool).tril())
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, at: Tensor, start: int = 0) -> Tensor:
        x, mask = self.embedding(tokens), self.causal[None, None, at]
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (WIDTH,)), mask, at, start)
        return self.head(F.layer_norm(x, (WIDTH,)))

    @property
    def buffers_of_layers(self) -> list[Tensor]:
        """Every key and value buffer."""
        return [buffer for layer in self.layers for buffer in (layer.k_cache, layer.v_cache)]


def tokens_of(count: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Random tokens `[B, count]`."""
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def run(model: Callable[..., Tensor], tokens: Tensor, start: int, chunk: int = 1) -> Tensor:
    """Logits of tokens `[B, n]` given to the model `chunk` at a time, from position `start` on."""
    parts = []
    for i in range(0, tokens.shape[1], chunk):
        # a slice's strides would be another graph's
        part = tokens[:, i : i + chunk].clone(memory_format=torch.contiguous_format)
        parts.append(model(part, torch.arange(start + i, start + i + part.shape[1]), start + i))
    return torch.cat(parts, dim=1)
