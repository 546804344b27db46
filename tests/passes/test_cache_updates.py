"""Stock caches are found in each way that people write them, and a near miss is told from one."""

import re

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import repeat_kv
from capture import capture
from torch import Tensor, nn

from apack_compile.backend.backend import make_backend
from apack_compile.generate.reporting import stock_cache_notes
from apack_compile.passes import CacheUpdate, GraphRecord, Refusal, find_cache_updates
from apack_compile.passes.graph.effects import written
from apack_compile.passes.graph.nodes import op_name

TOKENS, WIDTH = 8, 4


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, keys, values)


def inputs() -> tuple[Tensor, ...]:
    """Query and new token `[2, 3, 1, 4]`, cache `[2, 3, 8, 4]`, its values, position, and position for each entry."""
    torch.manual_seed(0)
    q, new = torch.randn(2, 3, 1, WIDTH), torch.randn(2, 3, 1, WIDTH)
    keys, values = torch.randn(2, 3, TOKENS, WIDTH), torch.randn(2, 3, TOKENS, WIDTH)
    return q, new, keys, values, torch.tensor([5]), torch.full((2, 3, 1, WIDTH), 5)


def found_in(function, *args) -> list[CacheUpdate | Refusal]:
    return find_cache_updates(capture(function, *(args or inputs())).gm.graph)


def index_copy_in_place(q, new, keys, values, at, each):
    keys.index_copy_(2, at, new)
    values.index_copy_(2, at, new)
    return attend(q, keys, values)


def setitem(q, new, keys, values, at, each):
    keys[:, :, at] = new
    values[:, :, 5:6] = new
    return attend(q, keys, values)


def index_put_in_place(q, new, keys, values, at, each):
    torch.ops.aten.index_put_(keys, [None, None, at], new)
    torch.ops.aten.index_put_(values, [None, None, at], new)
    return attend(q, keys, values)


def index_put(q, new, keys, values, at, each):
    put = torch.ops.aten.index_put.default
    return attend(q, put(keys, [None, None, at], new), put(values, [None, None, at], new))


def slice_copy(q, new, keys, values, at, each):
    keys[:, :, 5:6].copy_(new)
    values.narrow(2, 5, 1).copy_(new)
    return attend(q, keys, values)


def scatter_in_place(q, new, keys, values, at, each):
    keys.scatter_(2, each, new)
    values.scatter_(-2, each, new)
    return attend(q, keys, values)


def cat_growth(q, new, keys, values, at, each):
    keys, values = torch.cat([keys, new], 2), torch.cat((values, new), dim=-2)
    return attend(q, keys, values), keys, values


def cat_after_slice(q, new, keys, values, at, each):
    keys, values = (torch.cat([x[:, :, 1:], new], 2) for x in (keys, values))
    return attend(q, keys, values), keys, values


def slice_after_cat(q, new, keys, values, at, each):
    keys, values = (torch.cat([x, new], 2)[:, :, -6:] for x in (keys, values))
    return attend(q, keys, values), keys, values


def cat_copied_back(q, new, keys, values, at, each):
    for x in (keys, values):
        x.copy_(torch.cat([x[:, :, 1:], new], 2))
    return attend(q, keys, values)


UPDATES = {
    "index_copy in place": (index_copy_in_place, "index_copy", True),
    "index_copy": (
        lambda q, new, k, v, at, e: attend(q, torch.index_copy(k, 2, at, new), v.index_copy(2, at, new)),
        "index_copy",
        False,
    ),
    "setitem": (setitem, "setitem", True),
    "index_put in place": (index_put_in_place, "index_put", True),
    "index_put": (index_put, "index_put", False),
    "slice_scatter": (
        lambda q, new, k, v, at, e: attend(q, torch.slice_scatter(k, new, 2, 5, 6), v.slice_scatter(new, 2, 5, 6)),
        "slice_scatter",
        False,
    ),
    "select_scatter": (
        lambda q, new, k, v, at, e: attend(q, *(torch.select_scatter(x, new[:, :, 0], 2, 5) for x in (k, v))),
        "select_scatter",
        False,
    ),
    "scatter": (
        lambda q, new, k, v, at, e: attend(q, torch.scatter(k, 2, e, new), v.scatter(2, e, new)),
        "scatter",
        False,
    ),
    "scatter in place": (scatter_in_place, "scatter", True),
    "copy to a slice": (slice_copy, "copy", True),
    "cat": (cat_growth, "cat", False),
    "slice, then cat": (cat_after_slice, "cat and slice", False),
    "cat, then slice": (slice_after_cat, "cat and slice", False),
    "cat, copied back": (cat_copied_back, "cat and slice", True),
}


@pytest.mark.parametrize("name", UPDATES)
def test_each_way_to_update_a_cache_is_found_for_keys_and_values(name):
    function, kind, in_place = UPDATES[name]
    found = found_in(function)
    assert [(u.stream, u.kind, u.in_place, u.token_dim) for u in found] == [
        ("key", kind, in_place, 2),
        ("value", kind, in_place, 2),
    ]
    assert {u.owner for u in found} == {"input"}
    assert found[0].state is not found[1].state


def test_tokens_are_followed_through_layout_repetition_and_a_prefix():
    def step(q, new, keys, values, at):
        keys[:, at] = new
        values.index_copy_(1, at, new)
        views = [repeat_kv(x.transpose(1, 2)[:, :, :6].to(torch.float32), 2) for x in (keys, values)]
        return attend(q, *views)

    by_token = torch.zeros(2, TOKENS, 3, WIDTH)
    found = found_in(
        step, torch.randn(2, 6, 1, WIDTH), torch.ones(2, 1, 3, WIDTH), by_token, by_token.clone(), torch.tensor([5])
    )
    assert [(u.kind, u.token_dim, u.state.name) for u in found] == [
        ("setitem", 1, "l_keys_"),
        ("index_copy", 1, "l_values_"),
    ]


def test_matmul_spelled_attention_has_its_caches_found_too():
    def step(q, new, keys, values, at, each):
        keys.index_copy_(2, at, new)
        values.index_copy_(2, at, new)
        return (q @ keys.mT).softmax(-1) @ values

    assert [u.kind for u in found_in(step)] == ["index_copy", "index_copy"]


class Static(nn.Module):
    """A cache as a module keeps it: a buffer for keys, a plain attribute for values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 3, TOKENS, WIDTH))
        self.values = torch.zeros(2, 3, TOKENS, WIDTH)

    def forward(self, q, new, at):
        self.keys.index_copy_(2, at, new)
        self.values[:, :, at] = new
        return attend(q, self.keys, self.values)


def test_the_owner_of_a_state_is_told():
    q, new, _, _, at, _ = inputs()
    found = found_in(Static(), q, new, at)
    assert [(u.stream, u.kind, u.owner) for u in found] == [
        ("key", "index_copy", "buffer"),
        ("value", "setitem", "module"),
    ]


def test_an_exported_cache_is_found_in_its_functional_form():
    q, new, _, _, at, _ = inputs()

    class Buffers(Static):
        def __init__(self):
            super().__init__()
            values = self.values
            del self.values
            self.register_buffer("values", values)

    program = torch.export.export(Buffers(), (q, new, at)).run_decompositions({})
    found = find_cache_updates(program.graph_module.graph)
    assert [(u.stream, u.kind, u.owner, u.in_place) for u in found] == [
        ("key", "index_copy", "buffer", False),
        ("value", "index_put", "buffer", False),
    ]


def written_after(q, new, keys, values, at, each):
    out = attend(q, keys, values)
    keys.index_copy_(2, at, new)
    return out


def rotated(q, new, keys, values, at, each):
    rotated = torch.cat([-new[..., 2:], new[..., :2]], -1)
    fresh = torch.empty_like(new)
    fresh[..., 0:2] = new[..., 2:]
    return attend(q, rotated + new, fresh)


NO_CACHE = {
    "computed here": rotated,
    "read only": lambda q, new, k, v, at, e: attend(q, k, v),
    "written after it is read": written_after,
}


@pytest.mark.parametrize("name", NO_CACHE)
def test_what_is_no_cache_is_not_listed(name):
    assert found_in(NO_CACHE[name]) == []


def _written(edit):
    def step(q, new, keys, values, at, each):
        edit(keys, new, at, each)
        return attend(q, keys, values)

    return step


UNCLEAR = {
    "wrong dimension": (
        _written(lambda k, new, at, e: k.index_copy_(1, at[:1] * 0, k[:, 1:2] * 2)),
        r"dimension \[1\], tokens are dimension 2",
    ),
    "accumulated": (
        _written(
            lambda k, new, at, e: k.index_put_((torch.tensor([0]), torch.tensor([0]), at), new[0, 0], accumulate=True)
        ),
        "accumulates",
    ),
    "several dimensions": (
        _written(lambda k, new, at, e: k.index_put_((torch.tensor([0]), torch.tensor([0]), at), new[0, 0])),
        "positions of several dimensions",
    ),
    "one head only": (_written(lambda k, new, at, e: k[:, :1].index_copy_(2, at, new[:, :1])), r"dimension \[1, 2\]"),
    "reduced": (_written(lambda k, new, at, e: k.scatter_(2, e, new, reduce="add")), "with reduce"),
    "part of the heads": (
        _written(lambda k, new, at, e: k.scatter_(2, e[:, :2], new[:, :2])),
        "into a part of the other",
    ),
    "scaled in place": (_written(lambda k, new, at, e: k.mul_(2)), "mul_ writes into l_keys_, which is no known"),
    "all replaced": (_written(lambda k, new, at, e: k.copy_(new.expand_as(k))), "copy_ replaces all of it"),
    "through a reshape": (
        _written(lambda k, new, at, e: k.view(6, TOKENS, WIDTH).index_copy_(1, at, new.view(6, 1, WIDTH))),
        "place in l_keys_ is not known",
    ),
    "cat of other dims": (
        lambda q, new, k, v, at, e: (lambda c: (attend(q[:, :1].expand(2, 4, 1, 4), c, c), c))(
            torch.cat([k, k[:, :1] * 2], 1)
        ),
        "cat along dimension 1",
    ),
    "cat in front": (
        lambda q, new, k, v, at, e: (lambda c: (attend(q, c, c), c))(torch.cat([new * 2, k], 2)),
        "not its first of two parts",
    ),
    "cat of three": (
        lambda q, new, k, v, at, e: (lambda c: (attend(q, c, c), c))(torch.cat([k, new * 2, new * 3], 2)),
        "not its first of two parts",
    ),
    "prefix": (
        lambda q, new, k, v, at, e: attend(q, torch.cat([k, new * 2], 2), torch.cat([v, new * 2], 2)),
        "does not keep",
    ),
    "part of the heads grows": (
        lambda q, new, k, v, at, e: (lambda c: (attend(q[:, :2], c, c), c))(torch.cat([k[:, :2], new[:, :2] * 2], 2)),
        "a part of a cache's other dimensions",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_write_that_is_no_known_update_is_refused_with_its_reason(name):
    function, reason = UNCLEAR[name]
    first = found_in(function)[0]
    assert isinstance(first, Refusal)
    assert re.search(reason, first.reason), first.reason


def test_the_record_of_a_graph_lists_its_stock_caches():
    records: list[GraphRecord] = []
    torch._dynamo.reset()
    torch.compile(index_copy_in_place, backend=make_backend(records.append, inner="eager"))(*inputs())
    updates = records[0].cache_updates
    assert [(u.details["kind"], u.details["state"], u.packed) for u in updates] == [
        ("index_copy", "l_keys_", False),
        ("index_copy", "l_values_", False),
    ]
    assert all("bytes are unchanged" in u.reason for u in updates)
    assert stock_cache_notes(records) == ["stock cache updated by index_copy, bytes unchanged (2 streams)"]


class Repeating(nn.Module):
    """Grouped queries over a cache, keys and values repeated in two ways; positions pass through a `torch.no_grad` block."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 3, TOKENS, WIDTH))

    def forward(self, q, new, at):
        with torch.no_grad():
            rotated = self.block(at)
        self.keys.index_copy_(2, at, new * rotated)
        self.values[:, :, at] = new
        return attend(q.repeat_interleave(2, 1), repeat_kv(self.keys, 2), self.values.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("block, writes", [(lambda at: at.cos(), []), (lambda at: at.mul_(1).cos(), ["at"])])
def test_an_exported_graph_shows_repeated_heads_and_what_a_no_grad_block_writes(block, writes):
    q, new, _, _, at, _ = inputs()
    graph = torch.export.export(Repeating(block), (q, new, at)).module(check_guards=False).graph
    found = find_cache_updates(graph)
    assert [(u.stream, u.kind) for u in found] == [("key", "index_copy"), ("value", "index_put")]
    (wrapper,) = [node for node in graph.nodes if "set_grad_enabled" in op_name(node) and "wrap" in op_name(node)]
    assert [node.name for node in written(wrapper)] == writes


@pytest.mark.parametrize(
    "layer, leaves", [(nn.Linear(4, 4), True), (nn.ReLU(), True), (nn.ReLU(inplace=True), False), (Static(), False)]
)
def test_which_called_modules_leave_their_inputs_alone(layer, leaves):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    called = graph.call_module("layer", (x,))
    graph.output(called)
    gm = torch.fx.GraphModule(nn.ModuleDict({"layer": layer}), graph)
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    assert written(node) == ([] if leaves else [node.args[0]])
