"""Which attentions are sites, and what is said of the others."""

import operator
import re

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import CAPACITY, HEAD_SHARING, NEGATIVES, Case, repeat_kv, update
from capture import Captured, capture
from torch import nn

from apack_compile.passes import AttentionSite, Refusal, find_sites
from apack_compile.passes.graph.effects import is_pure, written
from apack_compile.passes.graph.nodes import layer_path


def only_site(captured: Captured) -> AttentionSite:
    (found,) = find_sites(captured.gm.graph)
    assert isinstance(found, AttentionSite), found.reason
    return found


def reasons(captured: Captured) -> list[str]:
    return [found.reason for found in find_sites(captured.gm.graph) if isinstance(found, Refusal)]


@pytest.mark.parametrize("spelling", HEAD_SHARING)
def test_a_site_is_found_through_every_spelling_of_shared_heads(spelling):
    case = Case(gqa=spelling, scale=0.3)
    site = only_site(capture(case.function(), *case.inputs()))
    assert (site.attention.spelling, site.attention.scale) == ("scaled_dot_product_attention", 0.3)
    assert site.groups == (1 if spelling == "grouped_query" else 2)
    assert [term.node.op for term in site.attention.masks] == ["placeholder"]


def test_arguments_are_read_by_position_and_by_keyword():
    def by_position(q, k, v, state, mask):
        keys, values = update(k, v, state)
        return F.scaled_dot_product_attention(q, keys, values, mask, 0.0, False, scale=2.0, enable_gqa=True)

    def by_keyword(q, k, v, state, mask):
        keys, values = update(k, v, state)
        return F.scaled_dot_product_attention(
            enable_gqa=True, scale=2, is_causal=False, dropout_p=0.0, attn_mask=mask, value=values, key=keys, query=q
        )

    for spelled in (by_position, by_keyword):
        found = only_site(capture(spelled, *Case().inputs())).attention
        assert (found.query.name, found.masks[0].node.name, found.scale) == ("l_q_", "l_mask_", 2.0)


def test_one_kv_head_may_be_broadcast_without_repetition():
    def multi_query(q, k, v, state, mask):
        return F.scaled_dot_product_attention(q, *update(k, v, state), attn_mask=mask)

    assert only_site(capture(multi_query, *Case(kv_heads=1, groups=3).inputs())).groups == 3


@pytest.mark.parametrize("name", NEGATIVES)
def test_a_spelling_that_means_something_else_is_refused_with_its_reason(name):
    function, reason = NEGATIVES[name]
    captured = capture(function, *Case().inputs())
    found = find_sites(captured.gm.graph)
    assert not [f for f in found if isinstance(f, AttentionSite)]
    assert re.search(reason, found[0].reason), found[0].reason
    assert all(f.packed for f in found)


def test_attention_over_dense_keys_is_refused_as_dense_even_behind_a_packed_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(8, 8)

        def forward(self, q, k, v, state, mask):
            keys, values = update(k, v, state)
            out = F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)
            dense = self.key(out)
            return out + F.scaled_dot_product_attention(dense, dense, dense)

    with torch.no_grad():
        first, second = find_sites(capture(Two(), *Case().inputs()).gm.graph)
    assert isinstance(first, AttentionSite)
    assert isinstance(second, Refusal)
    assert second.reason == "dense: key does not come from a packed cache"
    assert not second.packed


def test_two_attentions_may_read_one_packed_cache():
    def both(q, k, v, state, mask):
        keys, values = (repeat_kv(x, 2) for x in update(k, v, state))
        out = F.scaled_dot_product_attention(q, keys, values, mask)
        return out + F.scaled_dot_product_attention(q + 1, keys, values, mask)

    found = find_sites(capture(both, *Case().inputs()).gm.graph)
    assert [type(f) for f in found] == [AttentionSite, AttentionSite]


def test_keys_read_elsewhere_too_are_reported_and_the_site_is_still_found():
    def returned(q, k, v, state, mask):
        keys, values = update(k, v, state)
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask), keys.sum()

    site, refusal = find_sites(capture(returned, *Case().inputs()).gm.graph)
    assert isinstance(site, AttentionSite)
    assert refusal.node is site.unpack
    assert "used by output" in refusal.reason


def test_keys_that_only_dead_code_reads_are_not_reported():
    def dead(q, k, v, state, mask):
        keys, values = update(k, v, state)
        keys.transpose(1, 2) + 1
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)

    only_site(capture(dead, *Case().inputs()))


def test_writes_to_other_memory_between_cache_and_attention_do_not_matter():
    def counted(q, k, v, state, mask, other):
        keys, values = update(k, v, state)
        other.add_(1)
        q = q.clone().mul_(2)
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)

    only_site(capture(counted, *Case().inputs(), torch.zeros(3)))


def test_a_write_through_another_view_of_the_cache_is_refused():
    def aliased(q, k, v, state, mask, view):
        keys, values = update(k, v, state)
        view.mul_(2)
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)

    inputs = Case().inputs()
    captured = capture(aliased, *inputs, inputs[3].dense[0][:, :1])
    assert "mul_ may write l_view_" in reasons(captured)[0]


def test_attention_that_needs_a_gradient_is_refused():
    query, *rest = Case().inputs()
    assert reasons(capture(Case().function(), query.requires_grad_(), *rest)) == [
        "a gradient is needed, and attention over a packed cache has none"
    ]


def test_spelled_out_attention_under_autocast_is_refused():
    def lower(q, k, v, state, mask):
        keys, values = update(k, v, state)
        with torch.autocast("cpu", torch.bfloat16):
            scores = q @ repeat_kv(keys, 2).transpose(2, 3) + mask
            return scores.softmax(-1) @ repeat_kv(values, 2)

    assert "changes type" in reasons(capture(lower, *Case().inputs()))[0]


def test_repeating_keys_and_values_differently_is_refused():
    def uneven(q, k, v, state, mask):
        keys, values = update(k, v, state)
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 4), repeat_kv(values, 2), mask, enable_gqa=True)

    captured = capture(uneven, *Case(groups=4).inputs())
    assert "key heads are repeated 4 times, value heads 2 times" in reasons(captured)


def test_the_layer_path_comes_from_the_module_stack():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def forward(self, q, k, v, states, mask):
            for layer, state in zip(self.layers, states, strict=True):
                q = layer(q, k, v, state, mask)
            return q

    class Attention(nn.Module):
        def forward(self, q, k, v, state, mask):
            keys, values = update(k, v, state)
            return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)

    case = Case()
    q, k, v, state, mask = case.inputs()
    found = find_sites(capture(Model(), q, k, v, [state, case.state()], mask).gm.graph)
    assert [f.layer for f in found] == ["layers.0", "layers.1"]


def test_a_node_without_a_module_stack_has_no_layer():
    captured = capture(Case().function(), *Case().inputs())
    assert {layer_path(node) for node in captured.gm.graph.nodes} == {None}


def test_sites_are_found_with_dynamic_shapes():
    def any_batch(q, k, v, state, mask):
        keys, values = update(k, v, state)
        return F.scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask[..., :CAPACITY])

    inputs = Case(batch=3).inputs()
    for tensor in (inputs[0], inputs[1], inputs[2]):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    captured = capture(any_batch, *inputs, dynamic=None)
    assert any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in captured.gm.graph.nodes)
    only_site(captured)


def test_what_a_node_writes_is_known_for_each_way_to_write():
    def writes(x, y, z):
        x.mul_(2)
        x[0] = 1.0
        x += y
        torch.add(y, 1, out=z)
        F.relu(y, inplace=True)
        y.bernoulli_(0.5)
        return x & y.int() if False else x * y

    captured = capture(writes, *(torch.ones(3) for _ in range(3)))
    found = [(node.name, [w.name for w in written(node)]) for node in captured.gm.graph.nodes if not is_pure(node)]
    targets = {name for _, names in found for name in names}
    assert {"l_x_", "l_y_", "l_z_"} <= targets
    assert operator.mul in {node.target for node in captured.gm.graph.nodes if is_pure(node)}
