"""Random graphs around attention over a packed cache: spellings, masks, shared heads, detours, further uses, writes, aliases.

Most choices are harmless, so that many attentions can be rewritten; each has a small chance to be one that must be refused.
A mask always hides the empty slots: that is what `unpack` asks of its reader.
"""

import math
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from attention_graphs import CAPACITY, HELD, Case, State
from graph_builder import Builder, sizes
from state_lists import append_lists, state_of
from torch import Tensor, fx


@dataclass(frozen=True)
class Program:
    """A graph, inputs for it, and how many attentions it has."""

    gm: fx.GraphModule
    inputs: list[Tensor]
    attentions: int


def random_program(seed: int, dtype: torch.dtype, exact: bool = False) -> Program:
    """The graph of a seed; with `exact` the same graph, its numbers and its casts in float64."""
    return _Generator(seed, dtype, exact).program()


class _Generator:
    def __init__(self, seed: int, dtype: torch.dtype, exact: bool) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.dtype, self.exact = dtype, exact
        # A number given to torch.where is float32 first.
        self.lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        self.builder = Builder()
        self.outputs: list[fx.Node] = []
        self.victims: list[fx.Node] = []
        pick = self.random.choice
        self.case = Case(
            batch=pick([1, 2]),
            kv_heads=pick([1, 2, 3]),
            groups=pick([1, 2, 2, 3]),
            rows=pick([1, 1, 2, 3]),
            head_dim=pick([4, 7, 8]),
            dtype=dtype,
        )

    def program(self) -> Program:
        """One attention, or two in a row."""
        case, count = self.case, 1 + self.chance(0.3)
        query = self.input(torch.randn(case.batch, case.kv_heads * case.groups, case.rows, case.head_dim))
        for _ in range(count):
            query = self.attention(query)
        self.outputs.append(query)
        return Program(self.builder.finish(self.outputs), self.builder.inputs, count)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, usual: Sequence[str], rare: Sequence[str], share: float) -> str:
        """One of the usual choices, with probability `share` one of the rare ones."""
        return self.random.choice(rare if self.chance(share) else usual)

    def type(self, wanted: torch.dtype) -> torch.dtype:
        return torch.float64 if self.exact else wanted

    def input(self, tensor: Tensor) -> fx.Node:
        """A placeholder; floating-point numbers take the graph's type, rounded to it in the exact graph too."""
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype).to(self.type(self.dtype))
        return self.builder.input(tensor)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.builder.call(target, *args, **kwargs)

    def attention(self, query: fx.Node) -> fx.Node:
        """One attention that takes and gives `[B, H_q, rows, D]`."""
        self.victims = [query, self.input(torch.randn(3))]
        if self.chance(0.1):
            self.victims.append(self.call("transpose", query, 1, 2))
        keys, values = self.tokens()
        self.maybe_write()
        masks = self.masks()
        spelling = self.pick(["sdpa", "matmul", "matmul", "matmul"], ["bmm"], 0.05)
        keys, values = (self.detour(x) for x in (keys, values))
        heads = ["repeat_kv", "unsqueeze", "interleave", "grouped_query"]
        wrong = ["tile", "front", "mixed"]
        how = "none" if self.case.groups == 1 else self.pick(heads, wrong, 0.08)
        if how != "none" and spelling == "sdpa" and self.chance(0.2):
            how = "enable_gqa"
        shared_rows = all(sizes(mask)[1] == sizes(mask)[2] == 1 for mask in masks)
        if how == "grouped_query" and not shared_rows:
            how = "repeat_kv"
        if how == "grouped_query" and spelling == "matmul" and self.chance(0.5):
            out = self.five_dimensions(query, keys, values, masks)
        else:
            inner, keys, values = self.share_heads(how, query, keys, values)
            self.maybe_write()
            if spelling == "sdpa":
                out = self.sdpa(inner, keys, values, masks, how == "enable_gqa")
            elif spelling == "bmm":
                out = self.three_dimensions(inner, keys, values, masks)
            else:
                out = self.product(self.weights(self.scores(inner, keys, masks)), values)
        out = out if how != "grouped_query" else self.call("reshape", out, sizes(query))
        self.maybe_write()
        if self.chance(0.06):
            self.outputs.append(self.call("sum", self.random.choice([keys, values])))
        return out

    def tokens(self) -> tuple[fx.Node, fx.Node]:
        """Keys and values of a packed cache; sometimes plain inputs, or of two caches."""
        kind = self.pick(["packed"], ["dense", "two caches", "dense value", "swapped", "key twice"], 0.15)
        if kind == "dense":
            return self.dense(), self.dense()
        keys, values = self.packed()
        if kind == "two caches":
            return keys, self.packed()[1]
        if kind == "dense value":
            return keys, self.dense()
        return {"swapped": (values, keys), "key twice": (keys, keys)}.get(kind, (keys, values))

    def dense(self) -> fx.Node:
        case = self.case
        return self.input(torch.randn(case.batch, case.kv_heads, CAPACITY, case.head_dim))

    def packed(self) -> tuple[fx.Node, fx.Node]:
        """What a packed cache layer emits in a decode step."""
        case, state = self.case, self.case.state()
        new = [self.input(torch.randn(case.batch, case.kv_heads, case.rows, case.head_dim)) for _ in range(2)]
        nodes = State(
            *([self.input(t) for t in part] for part in state[:3]),
            state.bands,
            [self.input(t) for t in state.positions],
            self.input(state.cursor),
        )
        stores = [*nodes.dense[2:], *nodes.codes[4:]]
        lists = append_lists(stores, nodes.bases[6:], nodes.bands[8:], nodes.cursor)
        self.call(torch.ops.apack.append, *new, *lists)
        both = self.call(torch.ops.apack.unpack, *new, *state_of(*nodes).flatten(), CAPACITY)
        keys, values = (self.call(operator.getitem, both, at) for at in (0, 1))
        self.victims += [keys, values, nodes.dense[2], nodes.codes[4], new[0]]
        return keys, values

    def masks(self) -> list[fx.Node]:
        """One mask that hides the empty slots, sometimes a second of any kind."""
        nodes = [self.hiding()]
        if self.chance(0.25):
            case = self.case
            slopes = torch.rand(1, self.random.choice([1, case.kv_heads * case.groups]), 1, 1)
            nodes.append(self.input(slopes * -torch.arange(CAPACITY)) if self.chance(0.5) else self.hiding())
            if self.chance(0.5):
                nodes.reverse()
        self.victims += nodes
        return nodes

    def hiding(self) -> fx.Node:
        """A causal or sliding mask over the capacity, boolean or added."""
        case, pick = self.case, self.random.choice
        rows = pick([1, case.rows])
        ends = HELD + torch.arange(case.rows)[-rows:]
        allowed = torch.arange(CAPACITY) <= ends[:, None]
        if self.chance(0.3):
            allowed &= torch.arange(CAPACITY) > ends[:, None] - 5
        full = (pick([1, case.batch]), pick([1, 1, case.kv_heads * case.groups]), rows, CAPACITY)
        mask = allowed.expand(full).clone()
        if self.chance(0.5):
            return self.input(mask)
        return self.input(torch.zeros(full).masked_fill(~mask, pick([-math.inf, self.lowest, -1e4])))

    def detour(self, x: fx.Node) -> fx.Node:
        """A step between the cache and the attention."""
        usual = ["nothing", "nothing", "nothing", "contiguous", "slice", "twice", "same type"]
        rare = [
            "scale",
            "flip",
            "roll",
            "reshaped",
            "permuted",
            "clone",
            "rounded",
            "views",
            "negated",
            "heads and batch",
        ]
        kind = self.pick(usual, rare, 0.06)
        if kind == "slice":
            return self.call(operator.getitem, x, (slice(None), slice(None), slice(None, CAPACITY)))
        if kind == "twice":
            return self.call("transpose", self.call("transpose", x, 1, 2), 1, 2)
        if kind == "permuted":
            return self.call("reshape", self.call("permute", x, 0, 1, 3, 2), sizes(x))
        if kind == "reshaped":
            return self.call("reshape", self.call("reshape", x, (sizes(x)[0], -1)), sizes(x))
        if kind == "heads and batch":
            swaps = self.case.batch == self.case.kv_heads
            return self.call("permute", self.call("permute", x, 2, 1, 0, 3), *((1, 2, 0, 3) if swaps else (2, 1, 0, 3)))
        if kind == "rounded":
            return self.call("to", self.call("to", x, self.type(torch.float16)), self.type(self.dtype))
        if kind == "views":
            view = self.call(operator.getitem, x, (slice(None), slice(0, 1)))
            self.victims.append(view)
            return x
        plain = {
            "contiguous": ("contiguous",),
            "clone": ("clone",),
            "same type": ("to", self.type(self.dtype)),
            "scale": (operator.mul, 1.5),
            "flip": (torch.flip, (2,)),
            "roll": (torch.roll, 1, 2),
            "negated": (operator.neg,),
        }
        return x if kind == "nothing" else self.call(plain[kind][0], x, *plain[kind][1:])

    def share_heads(self, how: str, query: fx.Node, keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Query, keys and values whose heads match."""
        batch, _, rows, width = sizes(query)
        if how == "grouped_query":
            query = self.call("reshape", query, (batch, self.case.kv_heads, self.case.groups * rows, width))
        if how in ("none", "enable_gqa", "grouped_query"):
            return query, keys, values
        first, second = ("repeat_kv", "tile") if how == "mixed" else (how, how)
        return query, self.repeat(keys, first), self.repeat(values, second)

    def repeat(self, x: fx.Node, how: str) -> fx.Node:
        batch, heads, tokens, width = sizes(x)
        n = self.case.groups
        if how == "tile":
            return self.call("repeat", x, 1, n, 1, 1)
        if how == "interleave":
            return self.call(torch.repeat_interleave, x, n, 1)
        if how == "front":
            wide = self.call("expand", self.call("unsqueeze", x, 1), batch, n, heads, tokens, width)
        elif how == "unsqueeze":
            wide = self.call("contiguous", self.call("expand", self.call("unsqueeze", x, 2), -1, -1, n, -1, -1))
        else:
            index = (slice(None), slice(None), None, slice(None), slice(None))
            wide = self.call("expand", self.call(operator.getitem, x, index), batch, heads, n, tokens, width)
        return self.call("reshape", wide, (batch, heads * n, tokens, width))

    def sdpa(self, query: fx.Node, keys: fx.Node, values: fx.Node, masks: list[fx.Node], gqa: bool) -> fx.Node:
        mask = masks[0]
        for other in masks[1:]:
            mask, other = (self.as_added(m) for m in (mask, other))
            mask = self.call(operator.add, mask, other)
        scale = self.random.choice([None, 0.3])
        dropout = 0.5 if self.chance(0.02) else 0.0
        return self.call(
            F.scaled_dot_product_attention, query, keys, values, mask, dropout, False, scale=scale, enable_gqa=gqa
        )

    def as_added(self, mask: fx.Node) -> fx.Node:
        if mask.meta["example_value"].dtype != torch.bool:
            return mask
        zero = self.call(torch.zeros, (), dtype=self.type(self.dtype))
        return self.call(torch.where, mask, zero, -math.inf)

    def scores(self, query: fx.Node, keys: fx.Node, masks: list[fx.Node]) -> fx.Node:
        """Scaled and masked scores in one of many spellings."""
        scale = 0.3
        how = self.random.choice(
            ["mul", "div", "rmul", "mul_", "query", "query div", "key", "rotated key", "both", "full", "none"]
        )
        if how in ("query", "query div", "both"):
            root = math.sqrt(scale) if how == "both" else scale
            query = self.call(operator.truediv, query, 1 / root) if "div" in how else self.call("mul", query, root)
        if how in ("key", "both"):
            keys = self.call(operator.mul, keys, math.sqrt(scale) if how == "both" else scale)
            self.victims.append(keys)
        if self.chance(0.2):
            if self.chance(0.05):
                self.write(keys)
            letters = self.random.choice(["bhqd,bhkd->bhqk", "b n i d, b n j d -> b n i j"])
            scores = self.call(torch.einsum, letters, query, keys)
        else:
            rotation = self.random.choice([("transpose", -2, -1), ("transpose", 2, 3), ("permute", 0, 1, 3, 2), "mT"])
            rotated = (
                self.call(getattr, keys, "mT") if rotation == "mT" else self.call(rotation[0], keys, *rotation[1:])
            )
            rotated = self.call(operator.mul, rotated, scale) if how == "rotated key" else rotated
            rotated = self.call("contiguous", rotated) if self.chance(0.2) else rotated
            if self.chance(0.03):
                self.write(rotated)
            scores = self.call(self.random.choice([torch.matmul, operator.matmul, "matmul"]), query, rotated)
        if how == "full":
            scores = self.call(operator.truediv, scores, self.call(torch.full, (), 1 / scale))
        elif how in ("mul", "rmul", "mul_", "div"):
            left, right = (scale, scores) if how == "rmul" else (scores, 1 / scale if how == "div" else scale)
            target = {"mul_": "mul_", "div": operator.truediv}.get(how, operator.mul)
            scores = self.call(target, left, right)
        self.maybe_write()
        if self.chance(0.03):
            self.write(self.random.choice([query, *masks]))
        if self.chance(0.04):
            scores = self.call(operator.mul, self.call(torch.tanh, self.call(operator.truediv, scores, 5.0)), 5.0)
        for mask in masks:
            scores = self.masked(scores, mask)
        if self.chance(0.02):
            scores = self.call(operator.mul, scores, 0.5)
        if self.chance(0.03):
            self.outputs.append(scores)
        return scores

    def masked(self, scores: fx.Node, mask: fx.Node) -> fx.Node:
        """One mask on the scores."""
        self.maybe_write()
        if mask.meta["example_value"].dtype != torch.bool:
            how = self.random.choice(["add", "add to", "add_", "iadd"])
            if how == "add to":
                return self.call(operator.add, mask, scores)
            return self.call({"add": torch.add, "add_": "add_", "iadd": operator.iadd}[how], scores, mask)
        how = self.random.choice(["masked_fill", "masked_fill_", "statement", "where", "where swapped"])
        fill = self.random.choice([-math.inf, self.lowest, -1e4, -5.0 if self.chance(0.1) else -2e4])
        if how == "where":
            return self.call(torch.where, mask, scores, fill)
        hidden = self.call(operator.invert, mask)
        if how == "where swapped":
            return self.call(torch.where, hidden, fill, scores)
        written = self.call("masked_fill" if how == "masked_fill" else "masked_fill_", scores, hidden, fill)
        return scores if how == "statement" else written

    def weights(self, scores: fx.Node) -> fx.Node:
        """Softmax, casts and dropout that drops nothing; sometimes what no attention does."""
        wide = self.type(self.dtype if self.dtype == torch.float64 and self.chance(0.8) else torch.float32)
        how = self.pick(["plain", "method", "dtype", "float"], ["wrong dim", "shifted", "sinks", "half"], 0.1)
        if how == "shifted":
            scores = self.call(operator.sub, scores, self.call(torch.amax, scores, -1, keepdim=True))
        if how == "sinks":
            column = self.input(torch.randn(*sizes(scores)[:-1], 1))
            scores = self.call(torch.cat, [scores, column], -1)
        if how in ("float", "half"):
            scores = self.call("to", scores, wide if how == "float" else self.type(torch.float16))
        if how == "dtype":
            weights = self.call(F.softmax, scores, dim=-1, dtype=wide)
        else:
            weights = self.call(
                "softmax" if how == "method" else torch.softmax, scores, -2 if how == "wrong dim" else -1
            )
        if how == "sinks":
            weights = self.call(operator.getitem, weights, (Ellipsis, slice(None, -1)))
        if how in ("dtype", "float", "half"):
            weights = self.call("to", weights, self.type(self.dtype))
        if self.chance(0.3):
            weights = self.call(F.dropout, weights, 0.5, False)
        self.maybe_write([weights] if self.chance(0.2) else None)
        if self.chance(0.02):
            weights = self.call(F.dropout, weights, 0.5, True)
        if self.chance(0.03):
            weights = self.call(operator.mul, weights, 0.5)
        if self.chance(0.03):
            self.outputs.append(weights)
        return weights

    def product(self, weights: fx.Node, values: fx.Node) -> fx.Node:
        if self.chance(0.2):
            return self.call(torch.einsum, "bhqk,bhkd->bhqd", weights, values)
        return self.call(self.random.choice([torch.matmul, operator.matmul, "matmul"]), weights, values)

    def five_dimensions(self, query: fx.Node, keys: fx.Node, values: fx.Node, masks: list[fx.Node]) -> fx.Node:
        """Grouped query: `[B, H_kv, groups, rows, D]` against `[B, H_kv, 1, T, D]`."""
        query = self.call("unflatten", query, 1, (self.case.kv_heads, self.case.groups))
        keys, values = (self.call("unsqueeze", x, 2) for x in (keys, values))
        scores = self.call(torch.matmul, query, self.call("transpose", keys, -2, -1))
        for mask in masks:
            scores = self.masked(scores, self.call("unsqueeze", mask, 2))
        return self.call(torch.matmul, self.weights(scores), values)

    def three_dimensions(self, query: fx.Node, keys: fx.Node, values: fx.Node, masks: list[fx.Node]) -> fx.Node:
        """bmm over `[B * H, T, D]`."""
        batch, heads = sizes(query)[:2]
        flat = [self.call("flatten", x, 0, 1) for x in (query, keys, values)]
        scores = self.call(torch.bmm, flat[0], self.call("transpose", flat[1], 1, 2))
        scores = self.call("view", scores, (batch, heads, *sizes(scores)[1:]))
        for mask in masks:
            scores = self.masked(scores, mask)
        weights = self.weights(self.call("flatten", scores, 0, 1))
        return self.call("unflatten", self.call(torch.bmm, weights, flat[2]), 0, (batch, heads))

    def maybe_write(self, among: list[fx.Node] | None = None) -> None:
        """A statement in place on something that was read, will be read, or is a view of it."""
        if self.chance(0.05 if among is None else 0.3):
            self.write(self.random.choice(among or self.victims))

    def write(self, victim: fx.Node) -> None:
        """Change a part or all of a tensor; a mask goes on hiding what it hides."""
        value = victim.meta["example_value"]
        if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
            return  # torch refuses to write to an expanded tensor
        if value.dtype == torch.bool or value.shape[-1:] == (CAPACITY,):
            self.call(operator.setitem, victim, (Ellipsis, 3), False if value.dtype == torch.bool else -1e4)
        elif self.chance(0.5):
            self.call("mul_", victim, 0.5)
        else:
            self.call(operator.setitem, victim, (0,), 0.25)
