"""Dead code goes, effects stay."""

import pytest
import torch
import torch.nn.functional as F
from capture import capture
from torch import fx

from apack_compile.passes import RemoveDeadCode
from apack_compile.passes.graph.effects import is_pure


def clean(gm: fx.GraphModule) -> int:
    dead_code = RemoveDeadCode()
    count = dead_code.rewrite(gm.graph, dead_code.match(gm.graph))
    gm.graph.lint()
    gm.recompile()
    return count


def test_a_write_to_a_placeholder_that_is_read_again_survives():
    def step(keys, new, at):
        keys.index_copy_(2, at, new)
        return keys.sum(2)

    captured = capture(step, torch.zeros(1, 2, 4, 3), torch.ones(1, 2, 1, 3), torch.tensor([2]))
    write = next(node for node in captured.gm.graph.nodes if node.target == "index_copy_")
    assert not write.users
    old, old_inputs = captured.run()
    clean(captured.gm)
    assert captured.count("index_copy_") == 1
    new, new_inputs = captured.run()
    torch.testing.assert_close(new, old, rtol=0, atol=0)
    torch.testing.assert_close(new_inputs, old_inputs, rtol=0, atol=0)
    assert float(new[0].sum()) == 6


def _dropped(x):
    F.dropout(x, 0.5, True)
    return torch.rand(3)


def _setitem(x):
    x[1] = 5.0
    return x * 1


def _in_place_operator(x):
    y = x.view(-1)
    y += 1
    return x * 1


def _out(x):
    torch.mul(x, 3.0, out=x)
    return x * 1


def _inplace_argument(x):
    F.relu(x, inplace=True)
    return x * 1


def _inplace_positional(x):
    F.leaky_relu(x, 0.1, True)
    return x * 1


def _statistics(x):
    F.batch_norm(x.view(3, 1), x[:1].view(1), x[1:2].view(1), training=True)
    return x * 1


def _aten(x):
    torch.ops.aten.add_.Tensor(x, 1.0)
    return x * 1


def _bernoulli(x):
    x.sigmoid().bernoulli()
    return torch.rand(3)


@pytest.mark.parametrize(
    "function",
    [
        _dropped,
        _setitem,
        _in_place_operator,
        _out,
        _inplace_argument,
        _inplace_positional,
        _statistics,
        _aten,
        _bernoulli,
    ],
)
def test_an_effect_without_users_survives(function):
    captured = capture(function, torch.tensor([-1.0, 2.0, -3.0]))
    torch.manual_seed(0)
    old, old_inputs = captured.run()
    clean(captured.gm)
    torch.manual_seed(0)
    new, new_inputs = captured.run()
    torch.testing.assert_close(new, old, rtol=0, atol=0)
    torch.testing.assert_close(new_inputs, old_inputs, rtol=0, atol=0)


def test_pure_nodes_without_users_go_with_all_that_only_they_used():
    def wasteful(x, mask):
        (x[:, None].expand(3, 2).reshape(6) & mask).logical_not()
        torch.where(mask, 0.0, float("-inf")).to(torch.bfloat16).contiguous()
        return x.int() + 1

    captured = capture(wasteful, torch.ones(3, dtype=torch.bool), torch.ones(6, dtype=torch.bool))
    clean(captured.gm)
    assert [captured.count(name) for name in ("expand", "reshape", "and_", "where", "to", "contiguous")] == [0] * 6
    assert captured.count("int") == captured.count("add") == 1


def test_nothing_is_removed_twice():
    captured = capture(lambda x: (x + 1, x.cos())[0], torch.ones(2))
    clean(captured.gm)
    assert clean(captured.gm) == 0


def test_calls_of_unknown_functions_and_modules_are_not_pure():
    def expand(x):
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    assert not is_pure(graph.call_function(expand, (x,)))
    assert not is_pure(graph.call_module("inner", (x,)))
    assert not is_pure(graph.call_method("not_a_method_of_tensors", (x,)))
    assert not is_pure(graph.call_method("__setitem__", (x, 0, 1)))
    assert is_pure(graph.call_method("__and__", (x, x)))
    assert is_pure(graph.call_method("expand", (x, 2)))


def test_a_write_in_the_subgraph_of_a_higher_order_operator_survives():
    inner_graph = fx.Graph()
    state = inner_graph.placeholder("state")
    inner_graph.call_method("mul_", (state, 2))
    inner_graph.output(state)
    root = torch.nn.Module()
    root.inner = fx.GraphModule(torch.nn.Module(), inner_graph)
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    body = graph.get_attr("inner")
    graph.call_method("cos", (x,))
    graph.output(graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, "inner", x)))
    gm = fx.GraphModule(root, graph)
    assert clean(gm) == 1
    assert "mul_" in [node.target for node in gm.inner.graph.nodes]
