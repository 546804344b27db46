"""Attentions are found in the spellings that people write, with all that was done to the scores."""

import re

import pytest
import torch
import torch.nn.functional as F
from capture import capture
from inductor_patterns import PATTERNS, inputs
from torch import Tensor, fx
from torch.nn.attention.flex_attention import flex_attention

from apack_compile.passes import find_cache_updates, find_sites
from apack_compile.passes.attention.attention import Attention, NoAttention, find_attentions
from apack_compile.passes.attention.scores import same_equation
from apack_compile.passes.graph.memory import Memory


def found_in(graph: fx.Graph) -> list[Attention | NoAttention]:
    return find_attentions(graph, Memory.of(graph))


def only(function, *args) -> Attention | NoAttention:
    (found,) = found_in(capture(function, *args).gm.graph)
    return found


def again(found: Attention, gm: fx.GraphModule, args) -> Tensor:
    """What the found attention computes by its own description, in float64, from the values its nodes had."""
    values: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            values[n.name] = result.clone() if isinstance(result, Tensor) else result
            return result

    Keep(gm).run(*(x.clone() for x in args))
    query, key, value = (values[n.name].double() for n in (found.query, found.key, found.value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if found.scale is None else found.scale)
    if found.softcap is not None:
        scores = found.softcap * torch.tanh(scores / found.softcap)
    for term in found.masks:
        mask = values[term.node.name]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(mask.logical_xor(torch.tensor(term.keeps)), term.value)
        else:
            scores = scores + mask.double()
    if found.sinks is not None:
        scores = torch.cat([scores, values[found.sinks.name].double()], -1)
    weights = scores.softmax(-1)[..., : key.shape[-2]]
    torch.testing.assert_close(values[found.node.name].double(), weights @ value, rtol=1e-2, atol=1e-2)
    return weights @ value


@pytest.mark.parametrize("number", PATTERNS)
def test_each_spelling_that_inductor_knows_is_found_with_all_its_parts(number):
    pattern = PATTERNS[number]
    found = only(pattern.function, *inputs())
    assert isinstance(found, Attention), found.why
    assert found.scale == pytest.approx(pattern.scale if number not in (29, 30) else 0.5)
    assert tuple(type(term).__name__ for term in found.masks) == pattern.masks
    assert found.dropout == pattern.dropout
    assert found.grouped == pattern.grouped


@pytest.mark.parametrize("number", [n for n, p in PATTERNS.items() if not p.dropout and not p.grouped])
def test_what_was_found_computes_what_the_graph_computes(number):
    captured = capture(PATTERNS[number].function, *inputs())
    (found,) = found_in(captured.gm.graph)
    again(found, captured.gm, captured.inputs)


def test_no_pattern_of_the_installed_inductor_is_missing_here():
    from torch._inductor.fx_passes import fuse_attention

    theirs = {int(name.rsplit("_", 1)[1]) for name in vars(fuse_attention) if re.fullmatch(r"_sfdp_pattern_\d+", name)}
    assert theirs
    assert theirs <= set(PATTERNS)


def scores_of(q, k):
    return torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.5


FURTHER = {
    "einsum": lambda q, k, v, m, o: torch.einsum("bhqk,bhkd->bhqd", (scores_of(q, k) + m).softmax(-1), v),
    "mT": lambda q, k, v, m, o: F.softmax(q @ k.mT * 0.5 + m, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "scale first": lambda q, k, v, m, o: (0.5 * (q @ k.mT) + m).softmax(-1) @ v,
    "mask first": lambda q, k, v, m, o: (m + (q @ k.mT) / 2).softmax(-1) @ v,
    "largest taken off": lambda q, k, v, m, o: (
        (lambda s: (s - s.max(dim=-1, keepdim=True).values).softmax(-1))(q @ k.mT * 0.5 + m) @ v
    ),
    "amax taken off": lambda q, k, v, m, o: (
        (lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1))(q @ k.mT * 0.5 + m) @ v
    ),
    "dropout that does not train": lambda q, k, v, m, o: F.dropout((q @ k.mT * 0.5 + m).softmax(-1), 0.5, False) @ v,
    "where the other way round": lambda q, k, v, m, o: torch.where(m < 0, -torch.inf, q @ k.mT * 0.5).softmax(-1) @ v,
    "two masks": lambda q, k, v, m, o: (
        (q @ k.mT * 0.5 + m).masked_fill(o[:, None, None] == 0, torch.finfo(q.dtype).min).softmax(-1) @ v
    ),
    "ALiBi": lambda q, k, v, m, o: (
        (q @ k.mT * 0.5 + m + torch.arange(5.0) * torch.tensor([0.5, 0.25, 0.125])[:, None, None]).softmax(-1) @ v
    ),
    "softcap": lambda q, k, v, m, o: (torch.tanh(q @ k.mT * 0.5 / 3.0) * 3.0 + m).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_spellings_are_found_and_compute_the_same(name):
    captured = capture(FURTHER[name], *inputs())
    (found,) = found_in(captured.gm.graph)
    assert isinstance(found, Attention), found.why
    assert found.scale == 0.5
    again(found, captured.gm, captured.inputs)
    assert (found.softcap is not None) == (name == "softcap")


def in_place(q, k, v, m, o):
    scores = q @ k.mT
    scores *= 0.5
    scores += m
    scores.masked_fill_(o[:, None, None] == 0, -1e9)
    return scores.softmax(-1) @ v


def test_statements_in_place_on_the_scores_count_where_they_stand():
    captured = capture(in_place, *inputs())
    (found,) = found_in(captured.gm.graph)
    assert [type(term).__name__ for term in found.masks] == ["Added", "Filled"]
    again(found, captured.gm, captured.inputs)


def test_a_column_of_sinks_is_found():
    sinks = torch.randn(1, 3, 1, 1).expand(2, 3, 5, 1)

    def with_sinks(q, k, v, m, s):
        scores = torch.cat([q @ k.mT * 0.5 + m, s], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return F.softmax(scores, dim=-1)[..., :-1] @ v

    q, k, v, m, _ = inputs()
    captured = capture(with_sinks, q, k, v, m, sinks)
    (found,) = found_in(captured.gm.graph)
    assert found.sinks is not None
    again(found, captured.gm, captured.inputs)


def test_baddbmm_adds_its_input_as_a_mask():
    def bloom(q, k, v, bias):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return torch.bmm(torch.baddbmm(bias, q, k.mT, beta=1.0, alpha=0.5).softmax(-1), v)

    q, k, v, _, _ = inputs()
    found = only(bloom, q, k, v, torch.randn(6, 1, 5))
    assert (found.scale, [type(term).__name__ for term in found.masks]) == (0.5, ["Added"])


def test_flex_attention_is_found_by_name():
    q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
    found = only(lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)), q, k, v)
    assert (found.spelling, found.query.name) == ("flex_attention", "l_q_")


def test_an_exported_graph_is_read_like_a_traced_one():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, m, o):
            return FURTHER["two masks"](q, k, v, m, o) + F.scaled_dot_product_attention(q, k, v, m)

    graph = torch.export.export(Attend(), inputs()).graph_module.graph
    eager, fused = found_in(graph)
    assert (eager.spelling, eager.scale, [type(t).__name__ for t in eager.masks]) == (
        "matmul",
        0.5,
        ["Added", "Filled"],
    )
    assert fused.spelling == "scaled_dot_product_attention"


def test_an_einsum_equation_counts_in_any_letters_but_not_in_another_order():
    for equation in ("bhqd,bhkd->bhqk", "b n i d, b n j d -> b n i j"):
        assert same_equation(equation, "bhqd,bhkd->bhqk")
    for equation in ("bhqd,bhkd->bhkq", "bhqd,bhqd->bhqq", "bhqd,hbkd->bhqk", "bhqd,bhkd->bhq", ["b"]):
        assert not same_equation(equation, "bhqd,bhkd->bhqk")


def test_a_graph_without_recorded_shapes_is_read_without_an_error():
    class Step(torch.nn.Module):
        def forward(self, q, k, v, m, at, new):
            k = torch.index_copy(k, 2, at, new)
            return (q @ k.transpose(-2, -1) + m).softmax(-1) @ v + F.scaled_dot_product_attention(q, k, v, m)

    graph = fx.symbolic_trace(Step()).graph
    assert [found.spelling for found in found_in(graph)] == ["scaled_dot_product_attention"]
    assert find_cache_updates(graph) == []
    assert [found.packed for found in find_sites(graph)] == [False]


def test_what_has_no_queries_and_keys_is_no_attention():
    def router(x, w):
        gate = F.linear(x, w).softmax(-1)
        return gate @ w + (x @ w.mT).softmax(-1) @ w

    assert found_in(capture(router, torch.randn(2, 5, 4), torch.randn(4, 4)).gm.graph) == []


NOT_ATTENTION = {
    "wrong dim": (lambda q, k, v, m, o: (q @ k.mT).softmax(-2) @ v, "softmax over dim -2"),
    "scaled after the mask": (
        lambda q, k, v, m, o: ((q @ k.mT + m) * 0.5).softmax(-1) @ v,
        "scaled after they are masked",
    ),
    "scaled by a tensor": (lambda q, k, v, m, o: (q @ k.mT * o.sum()).softmax(-1) @ v, "scaled by a tensor"),
    "weights scaled": (lambda q, k, v, m, o: ((q @ k.mT).softmax(-1) * 0.5) @ v, "mul between the softmax"),
    "weights masked": (lambda q, k, v, m, o: ((q @ k.mT).softmax(-1) * (m == 0)) @ v, "mul between the softmax"),
    "weights used twice": (
        lambda q, k, v, m, o: (lambda w: (w @ v, w))((q @ k.mT).softmax(-1)),
        "used by (matmul and output|output and matmul)",
    ),
    "scores used twice": (
        lambda q, k, v, m, o: (lambda s: (s.softmax(-1) @ v, s))(q @ k.mT),
        "scores are also used by output",
    ),
    "weights written": (
        lambda q, k, v, m, o: (lambda w: (w.mul_(2), w @ v)[1])((q @ k.mT).softmax(-1)),
        "used by mul_ and matmul",
    ),
    "scores overwritten": (
        lambda q, k, v, m, o: (lambda s: (s.copy_(m.expand_as(s)), s.softmax(-1) @ v)[1])(q @ k.mT),
        "copy_ writes into",
    ),
    "key not transposed": (lambda q, k, v, m, o: (q @ k.reshape(2, 3, 4, 5)).softmax(-1) @ v, "not transposed"),
    "key rotated wrongly": (
        lambda q, k, v, m, o: (q @ k.permute(0, 3, 2, 1).reshape(2, 3, 4, 5)).softmax(-1) @ v,
        "not transposed",
    ),
    "sum of two products": (lambda q, k, v, m, o: (q @ k.mT + k @ q.mT).softmax(-1) @ v, "sum of two products"),
    "hides nothing": (lambda q, k, v, m, o: (q @ k.mT).masked_fill(m < 0, -5.0).softmax(-1) @ v, "puts -5 into"),
    "a nan hides nothing": (
        lambda q, k, v, m, o: (q @ k.mT).masked_fill(m < 0, float("nan")).softmax(-1) @ v,
        "puts nan into",
    ),
    "tanh of masked scores": (lambda q, k, v, m, o: (q @ k.mT + m).tanh().softmax(-1) @ v, "tanh of scores"),
    "mean taken off": (
        lambda q, k, v, m, o: (lambda s: (s - s.mean(-1, keepdim=True)).softmax(-1))(q @ k.mT) @ v,
        "something is subtracted",
    ),
    "largest of another dim": (
        lambda q, k, v, m, o: (lambda s: (s - s.amax(-2, keepdim=True)).softmax(-1))(q @ k.mT) @ v,
        "each row's largest",
    ),
    "weights on the right": (lambda q, k, v, m, o: v.mT @ (q @ k.mT).softmax(-1), "not the left operand"),
    "doubled mask": (lambda q, k, v, m, o: torch.add(q @ k.mT, m, alpha=2).softmax(-1) @ v, "multiple of a mask"),
    "no values": (lambda q, k, v, m, o: (q @ k.mT).softmax(-1).amax(-1), "amax between the softmax"),
    "scores in a given tensor": (
        lambda q, k, v, m, o: torch.add(q @ k.mT, m, out=torch.empty(2, 3, 5, 5)).softmax(-1) @ v,
        "given by out=",
    ),
    "other einsum": (lambda q, k, v, m, o: torch.einsum("bhqd,bhkd->bhkq", q, k).softmax(-1) @ v, "einsum"),
    "two dropped columns": (
        lambda q, k, v, m, o: torch.cat([q @ k.mT, m.expand(2, 3, 5, 5)], -1).softmax(-1)[..., :5] @ v,
        "more than one column",
    ),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_a_near_miss_is_refused_with_its_reason(name):
    function, reason = NOT_ATTENTION[name]
    found = only(function, *inputs())
    assert isinstance(found, NoAttention)
    assert re.search(reason, found.why), found.why
