"""The attention spellings that Inductor's fuse_attention.py lists, by its numbers, and what must be said of each.

Functions of query, key, value `[B, H, T, D]`, an additive mask `[B, 1, T, T]` and a mask of ones and zeros `[B, T]`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """One spelling: its scale, kinds of masks and dropout as they must be found."""

    function: Function
    scale: float = 0.5
    masks: tuple[str, ...] = ()
    dropout: float = 0.0
    grouped: bool = False


def _product(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-2, -1))


def _rotated(*tensors: Tensor) -> list[Tensor]:
    """As they are after a permute of `[B, T, H, D]`."""
    return [x.transpose(1, 2).permute(0, 2, 1, 3) for x in tensors]


def _half(q: Tensor, k: Tensor, v: Tensor, before: bool, dropout: float) -> Tensor:
    q, k, v = (x.half() for x in _rotated(q, k, v))
    score = (q / 2.0) @ k.transpose(-2, -1) if before else q @ k.transpose(-2, -1) / 2.0
    weight = torch.softmax(score.to(torch.float32), dim=-1)
    if dropout:
        weight = torch.dropout(weight, dropout, True)
    weight = weight.to(torch.float16)
    return weight @ v.to(weight.dtype)


def _filled(q: Tensor, k: Tensor, v: Tensor, ones: Tensor, before: bool, dropout: float) -> Tensor:
    q, k, v = _rotated(q, k, v)
    score = q.div(2.0) @ k.transpose(-2, -1) if before else (q @ k.transpose(-2, -1)).div(2.0)
    fill = torch.full((), -float("inf"), dtype=q.dtype, device=q.device)
    hidden = (ones == 0).view((q.size(0), 1, 1, k.size(-2))).expand_as(score)
    weight = torch.softmax(score.masked_fill(hidden, fill), dim=-1)
    return (F.dropout(weight, dropout) if dropout else weight) @ v


def _gpt2(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
    weight = torch.matmul(q, k.permute(0, 1, 3, 2))
    weight = weight.div(torch.full([], 2.0, dtype=weight.dtype, device=weight.device))
    lowest = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
    weight = torch.where(causal, weight, lowest)
    if added is not None:
        weight = weight + added
    return F.dropout(weight.softmax(dim=-1).type(v.dtype), 0.1).matmul(v)


def _t5(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rounded: bool, dropout: float) -> Tensor:
    q, k, v = _rotated(q, k, v)
    score = torch.matmul(q, k.permute(0, 1, 3, 2))
    if mask is not None:
        score = score + mask
    if rounded:
        score = score.float().type_as(q) if mask is None else score.type_as(q)
    weight = score.float().softmax(dim=-1).type_as(q)
    return (F.dropout(weight, dropout) if dropout else weight).matmul(v)


def _mbart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    batch, heads, rows, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    weight = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, rows, -1) + mask
    weight = F.softmax(weight.view(batch * heads, rows, -1), dim=-1)
    return torch.bmm(weight, v).view(batch, heads, rows, width)


def _decomposed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = _rotated(q, k, v)
    q, kt = torch.ops.aten.mul.Scalar(q, 0.5), torch.ops.aten.mul.Scalar(k.transpose(-2, -1), 0.5)
    score = q @ kt if mask is None else (q @ kt) + mask
    return torch.ops.aten._safe_softmax(score, -1) @ v


def _three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(F.dropout(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), p=0.1), v)


def _rotated_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _rotated(q, k, v)
    return _product(q, k).div(2.0)


PATTERNS = {
    1: Pattern(lambda q, k, v, m, o: _product(q, k).div(2.0).softmax(dim=-1).matmul(v)),
    2: Pattern(lambda q, k, v, m, o: _product(q, k).mul(0.5).softmax(dim=-1).matmul(v)),
    3: Pattern(lambda q, k, v, m, o: F.dropout(_product(q, k).div(2.0).softmax(dim=-1), p=0.1).matmul(v), dropout=0.1),
    4: Pattern(lambda q, k, v, m, o: F.dropout(_product(q, k).mul(0.5).softmax(dim=-1), p=0.1).matmul(v), dropout=0.1),
    5: Pattern(lambda q, k, v, m, o: torch.softmax((q @ k.transpose(-2, -1) / 2.0) + m, dim=-1) @ v, masks=("Added",)),
    6: Pattern(
        lambda q, k, v, m, o: torch.dropout(torch.softmax((q @ k.transpose(-2, -1) / 2.0) + m, -1), 0.1, True) @ v,
        masks=("Added",),
        dropout=0.1,
    ),
    7: Pattern(lambda q, k, v, m, o: _half(q, k, v, False, 0.1), dropout=0.1),
    8: Pattern(lambda q, k, v, m, o: _half(q, k, v, False, 0.0)),
    9: Pattern(lambda q, k, v, m, o: _half(q, k, v, True, 0.1), scale=1.0, dropout=0.1),
    10: Pattern(lambda q, k, v, m, o: _half(q, k, v, True, 0.0), scale=1.0),
    11: Pattern(lambda q, k, v, m, o: _rotated_scaled(q, k, v).softmax(dim=-1).matmul(*_rotated(v))),
    12: Pattern(
        lambda q, k, v, m, o: F.dropout(_rotated_scaled(q, k, v).softmax(dim=-1), p=0.1).matmul(*_rotated(v)),
        dropout=0.1,
    ),
    13: Pattern(lambda q, k, v, m, o: _three_dimensions(q, k, v), scale=1.0, dropout=0.1, grouped=True),
    14: Pattern(
        lambda q, k, v, m, o: (_rotated_scaled(q, k, v) + m).softmax(dim=-1).matmul(*_rotated(v)), masks=("Added",)
    ),
    15: Pattern(lambda q, k, v, m, o: _filled(q, k, v, o, False, 0.0), masks=("Filled",)),
    16: Pattern(
        lambda q, k, v, m, o: (
            F.dropout((_rotated_scaled(q, k, v) + m).softmax(dim=-1), 0.1).to(dtype=q.dtype).matmul(*_rotated(v))
        ),
        masks=("Added",),
        dropout=0.1,
    ),
    17: Pattern(lambda q, k, v, m, o: _filled(q, k, v, o, False, 0.1), masks=("Filled",), dropout=0.1),
    18: Pattern(lambda q, k, v, m, o: _gpt2(*_rotated(q, k, v), None), masks=("Filled",), dropout=0.1),
    19: Pattern(lambda q, k, v, m, o: _gpt2(q, k, v, m), masks=("Filled", "Added"), dropout=0.1),
    20: Pattern(lambda q, k, v, m, o: _filled(q, k, v, o, True, 0.1), scale=1.0, masks=("Filled",), dropout=0.1),
    21: Pattern(lambda q, k, v, m, o: _t5(q, k, v, m, True, 0.0), scale=1.0, masks=("Added",)),
    22: Pattern(lambda q, k, v, m, o: (_t5(q, k, v, m, True, 0.0), k, v), scale=1.0, masks=("Added",)),
    23: Pattern(lambda q, k, v, m, o: (_t5(q, k, v, None, True, 0.0), k, v), scale=1.0),
    24: Pattern(lambda q, k, v, m, o: _mbart(q, k, v, m), scale=1.0, masks=("Added",), grouped=True),
    25: Pattern(lambda q, k, v, m, o: _t5(q, k, v, m, False, 0.1), scale=1.0, masks=("Added",), dropout=0.1),
    26: Pattern(lambda q, k, v, m, o: (_t5(q, k, v, m, False, 0.1), k, v), scale=1.0, masks=("Added",), dropout=0.1),
    27: Pattern(lambda q, k, v, m, o: (_t5(q, k, v, None, False, 0.1), k, v), scale=1.0, dropout=0.1),
    28: Pattern(
        lambda q, k, v, m, o: F.dropout(
            _product(*(x.mT.contiguous().mT for x in (q, k))).mul(0.5).softmax(dim=-1), p=0.1
        ).matmul(v.mT.contiguous().mT),
        dropout=0.1,
    ),
    29: Pattern(lambda q, k, v, m, o: _decomposed(q, k, v, m), masks=("Added",)),
    30: Pattern(lambda q, k, v, m, o: _decomposed(q, k, v, None)),
}


def inputs(
    batch: int = 2, heads: int = 3, tokens: int = 5, width: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dense inputs of a pattern."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, width) for _ in range(3))
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    mask = torch.zeros(batch, 1, tokens, tokens).masked_fill(hidden, -math.inf)
    ones = torch.ones(batch, tokens)
    ones[0, 0] = 0
    return q, k, v, mask, ones
