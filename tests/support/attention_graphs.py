"""Attention over a packed cache in the spellings that models use, and spellings that must be refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from state_lists import append_lists, state_of
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import apack_compile.kernels

CAPACITY = 24
HELD = 11


class State(NamedTuple):
    """State arguments of the cache operations: a first, a vision, a text segment kept as they are, and a tail ring."""

    dense: list[Tensor]
    codes: list[Tensor]
    bases: list[Tensor]
    bands: list[int]
    positions: list[Tensor]
    cursor: Tensor

    def double(self) -> "State":
        """The same numbers in float64."""
        lists = [
            [t.double() if t.is_floating_point() else t.clone() for t in part] for part in (self.dense, self.codes)
        ]
        return self._replace(dense=lists[0], codes=lists[1], cursor=self.cursor.clone())


@dataclass(frozen=True)
class Case:
    """Shapes and spelling of one attention."""

    batch: int = 2
    kv_heads: int = 2
    groups: int = 2
    rows: int = 1
    head_dim: int = 8
    gqa: str = "repeat_kv"
    mask: str = "bool"
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, State, Tensor]:
        """Query, new keys and values, state that holds `HELD` tokens, mask."""
        torch.manual_seed(seed)
        heads = self.kv_heads * self.groups
        query, key, value = (
            torch.randn(self.batch, h, self.rows, self.head_dim) for h in (heads, *[self.kv_heads] * 2)
        )
        return (*(t.to(self.dtype) for t in (query, key, value)), self.state(), self.make_mask())

    def state(self) -> State:
        """Positions 0-1 first, 2-4 vision, 5-7 text with room for more, 8-10 in a tail of 4."""
        width = self.kv_heads * self.head_dim
        dense = [torch.randn(self.batch, self.kv_heads, n, self.head_dim).to(self.dtype) for n in (2, 2, 4, 4)]
        stored = [torch.randn(self.batch, 1, n, width).to(self.dtype) for n in (3, 3, 12, 12)]
        empty = torch.empty(0)
        codes = [t for store in stored for t in (store, torch.empty(0, dtype=torch.float16))]
        spans = [torch.arange(0, 2), torch.arange(2, 5), torch.arange(5, 17)]
        positions = [span.to(torch.int32).repeat(self.batch, 1) for span in spans]
        return State(dense, codes, [empty.clone() for _ in range(12)], [0] * 16, positions, torch.tensor([HELD, 8, 5]))

    def make_mask(self) -> Tensor:
        """The causal mask over the capacity, in the case's kind."""
        ends = HELD + torch.arange(self.rows)
        allowed = torch.arange(CAPACITY) <= ends[:, None]
        if self.mask == "sliding":
            allowed &= torch.arange(CAPACITY) > ends[:, None] - 5
        if self.gqa == "grouped_query":
            allowed = allowed[-1:]
        mask = allowed[None, None]
        if self.mask == "full":
            heads = self.kv_heads if self.gqa == "grouped_query" else self.kv_heads * self.groups
            rows = self.rows * self.groups if self.gqa == "grouped_query" else self.rows
            mask = mask.expand(self.batch, heads, rows, CAPACITY).clone()
            mask[0, :, :, 3] = False
        if self.mask == "float":
            return torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        return mask

    def function(self) -> Callable[..., Tensor]:
        """The attention as a model would write it."""
        repeat, attend, groups, scale = HEAD_SHARING[self.gqa], ATTENTIONS[self.attention], self.groups, self.scale

        def attention(query: Tensor, key: Tensor, value: Tensor, state: State, mask: Tensor) -> Tensor:
            keys, values = update(key, value, state)
            query, keys, values, extra = repeat(query, keys, values, groups)
            out = attend(query, keys, values, mask, scale, **extra)
            return out.reshape(*out.shape[:1], -1, out.shape[-1]) * 2

        return attention


def update(key: Tensor, value: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """What a packed cache layer does in a decode step."""
    stores = [*state.dense[2:], *state.codes[4:]]
    torch.ops.apack.append(key, value, *append_lists(stores, state.bases[6:], state.bands[8:], state.cursor))
    return torch.ops.apack.unpack(key, value, *state_of(*state).flatten(), CAPACITY)


def repeat_kv(x: Tensor, n: int) -> Tensor:
    """As transformers spells it."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, tokens, width).reshape(batch, heads * n, tokens, width)


def unsqueezed(x: Tensor, n: int) -> Tensor:
    """Another spelling of repeat_kv."""
    batch, heads, tokens, width = x.shape
    return x.unsqueeze(2).expand(-1, -1, n, -1, -1).contiguous().view(batch, heads * n, tokens, width)


def grouped(query: Tensor, keys: Tensor, values: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Query heads that share a KV head become rows of it."""
    batch, heads, rows, width = query.shape
    return query.reshape(batch, heads // groups, groups * rows, width), keys, values, {}


HEAD_SHARING: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Any]]]] = {
    "repeat_kv": lambda q, k, v, n: (q, repeat_kv(k, n), repeat_kv(v, n), {}),
    "unsqueeze": lambda q, k, v, n: (q, unsqueezed(k, n), unsqueezed(v, n), {}),
    "interleave_method": lambda q, k, v, n: (q, k.repeat_interleave(n, dim=1), v.repeat_interleave(n, 1), {}),
    "interleave_function": lambda q, k, v, n: (
        q,
        torch.repeat_interleave(k, n, 1).contiguous(),
        torch.repeat_interleave(v, repeats=n, dim=-3).to(v.dtype),
        {},
    ),
    "enable_gqa": lambda q, k, v, n: (q, k, v, {"enable_gqa": True}),
    "grouped_query": grouped,
}


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, **extra: Any) -> Tensor:
    """The fused spelling."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **extra)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def transformers_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """As transformers' eager_attention_forward spells it."""
    weights = torch.matmul(q, k.transpose(2, 3)) * _scale(q, scale)
    weights = weights + mask if mask.is_floating_point() else weights.masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.3, training=False), v)


def statements(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Everything in place."""
    scores = (q / (1 / _scale(q, scale))) @ k.mT
    if mask.is_floating_point():
        scores += mask
    else:
        scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """einsum, the scale on the keys, the mask by where."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k * _scale(q, scale))
    scores = mask + scores if mask.is_floating_point() else torch.where(mask, scores, -1e9)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, dim=3), v)


def two_masks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """An ALiBi bias besides the mask, scores less their largest."""
    distance = torch.arange(k.shape[2], device=k.device, dtype=q.dtype)
    slopes = torch.full((1, q.shape[1], 1, 1), 0.125, dtype=q.dtype, device=q.device)
    scores = q @ k.transpose(-1, -2) * _scale(q, scale) + slopes * distance
    scores = scores + mask if mask.is_floating_point() else torch.where(~mask, float("-inf"), scores)
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1) @ v


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa,
    "eager": transformers_eager,
    "statements": statements,
    "einsum": einsum,
    "two masks": two_masks,
}


def five_dimensions(query: Tensor, key: Tensor, value: Tensor, state: State, mask: Tensor) -> Tensor:
    """Query heads in groups `[B, H_kv, groups, rows, D]` against keys `[B, H_kv, 1, T, D]`."""
    keys, values = update(key, value, state)
    grouped = query.unflatten(1, (keys.shape[1], -1))
    scores = grouped @ keys[:, :, None].mT * 0.3
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return (scores.softmax(-1) @ values.unsqueeze(2).expand(-1, -1, grouped.shape[2], -1, -1)).flatten(1, 2)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **extra: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, repeat_kv(keys, 2), repeat_kv(values, 2), mask, **extra)


def _negative(edit: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, state: State, mask: Tensor) -> Tensor:
        keys, values = update(key, value, state)
        return edit(query, keys, values, mask, state)

    return attention


def _appended_between(query: Tensor, key: Tensor, value: Tensor, state: State, mask: Tensor) -> Tensor:
    keys, values = update(key, value, state)
    update(key, value, state)
    return _sdpa(query, keys, values, mask)


def _cursor_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    s.cursor.add_(1)
    return _sdpa(q, k, v, m)


def _view_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    k[:, :1].mul_(2)
    return _sdpa(q, k, v, m)


def _item_set(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    v[:, :, 0] = 0
    return _sdpa(q, k, v, m)


def _out_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    torch.mul(s.dense[0], 2.0, out=s.dense[0])
    return _sdpa(q, k, v, m)


def _eager(edit: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """matmul-softmax-matmul; `edit` gets the masked scores and the mask, and gives the weights."""

    def attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
        scores = (q @ repeat_kv(k, 2).mT * 0.5).masked_fill(~m, float("-inf"))
        return edit(scores, m) @ repeat_kv(v, 2)

    return _negative(attention)


def _weights_twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> tuple[Tensor, Tensor]:
    weights = (q @ repeat_kv(k, 2).mT).masked_fill(~m, float("-inf")).softmax(-1)
    return weights @ repeat_kv(v, 2), weights


def _written_between(what: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
        scores = torch.where(m, q @ repeat_kv(k, 2).mT, float("-inf"))
        {"query": q, "key": k, "mask": m}[what][:, :, :1] = 0
        return scores.softmax(-1) @ repeat_kv(v, 2)

    return attention


def _rotated_key_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    rotated = (repeat_kv(k, 2) * 0.5).mT.contiguous()
    rotated.mul_(2)
    return torch.where(m, q @ rotated, float("-inf")).softmax(-1) @ repeat_kv(v, 2)


def _scaled_key_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    scaled = repeat_kv(k, 2) * 0.5
    scaled.mul_(2)
    return torch.where(m, torch.einsum("bhqd,bhkd->bhqk", q, scaled), float("-inf")).softmax(-1) @ repeat_kv(v, 2)


def _sinks(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    scores = (q @ repeat_kv(k, 2).mT).masked_fill(~m, float("-inf"))
    return torch.cat([scores, q[..., :1] * 2], -1).softmax(-1)[..., :-1] @ repeat_kv(v, 2)


def _bmm(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, repeat_kv(k, 2), repeat_kv(v, 2)))
    scores = torch.bmm(q, k.mT).unflatten(0, (2, 4)).masked_fill(~m, float("-inf"))
    return torch.bmm(scores.flatten(0, 1).softmax(-1), v)


def _flex(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    return flex_attention(q, k, v, enable_gqa=True)


def _softcap(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: State) -> Tensor:
    score = torch.tanh(q @ repeat_kv(k, 2).transpose(2, 3) / 5.0) * 5.0
    return score.masked_fill(~m, float("-inf")).softmax(-1) @ repeat_kv(v, 2)


# name: (function of the default case's inputs, what the reason must say)
NEGATIVES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "permuted key": (
        _negative(lambda q, k, v, m, s: _sdpa(q, k.permute(0, 1, 3, 2).reshape(k.shape), v, m)),
        "key: reshape of permute between",
    ),
    "flipped value": (_negative(lambda q, k, v, m, s: _sdpa(q, k, v.flip(2), m)), "value: flip between"),
    "transposed heads": (_negative(lambda q, k, v, m, s: _sdpa(q, k.transpose(0, 1), v, m)), "key: transpose"),
    "scaled key": (_negative(lambda q, k, v, m, s: _sdpa(q, k * 2, v, m)), "key: mul"),
    "dropout": (_negative(lambda q, k, v, m, s: _sdpa(q, k, v, m, dropout_p=0.5)), "dropout_p is 0.5"),
    "causal": (_negative(lambda q, k, v, m, s: _sdpa(q, k, v, None, is_causal=True)), "is_causal"),
    "no mask": (_negative(lambda q, k, v, m, s: _sdpa(q, k, v, None)), "no mask"),
    "mask of rank 2": (_negative(lambda q, k, v, m, s: _sdpa(q, k, v, m[0, 0])), "mask has 2 dimensions"),
    "mask of one column": (_negative(lambda q, k, v, m, s: _sdpa(q, k, v, m[..., :1])), "does not broadcast"),
    "swapped": (_negative(lambda q, k, v, m, s: _sdpa(q, v, k, m)), "key and value are swapped"),
    "key twice": (_negative(lambda q, k, v, m, s: _sdpa(q, k, k, m)), "value output 0"),
    "tiled": (
        _negative(lambda q, k, v, m, s: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), repeat_kv(v, 2), m)),
        "key: repeat between",
    ),
    "tile": (
        _negative(lambda q, k, v, m, s: F.scaled_dot_product_attention(q, repeat_kv(k, 2), v.tile(1, 2, 1, 1), m)),
        "value: tile between",
    ),
    "expanded in front of the heads": (
        _negative(
            lambda q, k, v, m, s: F.scaled_dot_product_attention(
                q, k.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(q.shape[0], 4, *k.shape[2:]), repeat_kv(v, 2), m
            )
        ),
        "key: reshape of expand between",
    ),
    "interleaved tokens": (
        _negative(lambda q, k, v, m, s: _sdpa(q, k.repeat_interleave(2, 2)[:, :, ::2], v, m)),
        "key: getitem",
    ),
    "interleaved batch": (
        _negative(lambda q, k, v, m, s: _sdpa(q, k.repeat_interleave(2, dim=0)[:2], v, m)),
        "key: getitem",
    ),
    "softcap": (_negative(_softcap), "softcap 5: attend has none"),
    "sinks": (_negative(_sinks), "attention sinks: attend has none"),
    "flex_attention": (_negative(_flex), "neither score_mod nor block_mask"),
    "bmm": (_negative(_bmm), "batch and heads share one dimension"),
    "weights used twice": (_negative(_weights_twice), "weights are used by"),
    "softmax over queries": (_eager(lambda s, m: s.softmax(-2)), "softmax over dim -2"),
    "weights scaled": (_eager(lambda s, m: s.softmax(-1) * 0.5), "mul between the softmax"),
    "weights dropped": (_eager(lambda s, m: F.dropout(s.softmax(-1), 0.5)), "dropout_p is 0.5"),
    "scaled after the mask": (_eager(lambda s, m: (s * 0.5).softmax(-1)), "scaled after they are masked"),
    "softmax in half": (_eager(lambda s, m: s.half().softmax(-1).float()), "computes in torch.float16"),
    "mask that hides nothing": (
        _eager(lambda s, m: s.masked_fill(~m, -5.0).softmax(-1)),
        "masked_fill puts -5 into the scores",
    ),
    "query written in the attention": (_negative(_written_between("query")), "setitem may write l_query_"),
    "key written in the attention": (_negative(_written_between("key")), "setitem may write"),
    "mask written in the attention": (_negative(_written_between("mask")), "setitem may write l_mask_"),
    "rotated key written": (_negative(_rotated_key_written), "mul_ may write contiguous|mul_ may write rotated"),
    "scaled key written": (_negative(_scaled_key_written), "mul_ may write"),
    "second append": (_appended_between, "append may write"),
    "cursor written": (_negative(_cursor_written), "add_ may write"),
    "view of the key written": (_negative(_view_written), "mul_ may write"),
    "item of the value set": (_negative(_item_set), "setitem may write"),
    "written through out=": (_negative(_out_written), "mul may write"),
}


assert apack_compile.kernels  # registers torch.ops.apack
