"""A cache that cannot be packed stays dense and says why; the others are packed, and the program stays right."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from decoders import KV_HEADS, WIDTH, Decoder, dense_plan, exported, run, setitem, token_ids
from torch import Tensor, nn

import apack_compile
from apack_compile.errors import StrictError
from apack_compile.plan.budget import budget_plan
from apack_compile.plan.coarse_rule import CoarseRule, feature_count
from apack_compile.plan.presets.attentionpack import attentionpack_plan
from apack_compile.plan.presets.lossless import lossless_plan
from apack_compile.plan.rotation import KeyRotation

TOKENS, CHUNKS = 64, (9, *[1] * 8, 6)


def wrapped_around(cache, k, v, at):
    return setitem(cache, k, v, at % TOKENS)


def of_its_own(cache, k, v, at):
    """Positions that the module counts itself."""
    cache.count.copy_(torch.where(at[0] == 0, 0, cache.count))
    own = cache.count + torch.arange(k.shape[2])
    cache.keys[:, :, own] = k
    cache.values[:, :, own] = v
    cache.count.add_(k.shape[2])
    return cache.keys, cache.values


def differently(cache, k, v, at):
    cache.keys[:, :, at] = k
    cache.values[:, :, at + 0 * at[0]] = v
    return cache.keys, cache.values


def twice(cache, k, v, at):
    cache.keys[:, :, at] = k
    cache.keys[:, :, at] = k
    cache.values[:, :, at] = v
    return cache.keys, cache.values


def scaled(cache, k, v, at):
    keys, values = setitem(cache, k, v, at)
    values.mul_(1.0)
    return keys, values


def read_by_another(cache, k, v, at):
    keys, values = setitem(cache, k, v, at)
    return keys, values + 0 * values.amax()


def read_before(cache, k, v, at):
    k = k + 0 * cache.keys.sum()
    return setitem(cache, k, v, at)


def sliding(cache, k, v, at):
    for buffer, new in ((cache.keys, k), (cache.values, v)):
        buffer.copy_(torch.cat([buffer[:, :, k.shape[2] :], new], dim=2))
    return cache.keys, cache.values


def of_one_buffer(cache, k, v, at):
    cache.keys[:, :, at] = k
    return cache.keys, cache.keys


def scattered(cache, k, v, at):
    where = at[None, None, :, None].expand_as(k)
    return cache.keys.scatter_(2, where, k), cache.values.scatter_(2, where, v)


def only_keys(cache, k, v, at):
    cache.keys[:, :, at] = k
    return cache.keys, torch.cat([v, v.new_zeros(*v.shape[:2], TOKENS - v.shape[2], WIDTH)], dim=2)


def not_put_back(cache, k, v, at):
    """Each call sees its own tokens alone."""
    return torch.index_copy(cache.keys, 2, at, k), torch.index_copy(cache.values, 2, at, v)


def repeated(cache, k, v, at):
    """One token to as many slots as the call has tokens."""
    start = at[0].item()
    torch._check(start >= 0)
    torch._check(start + k.shape[2] <= TOKENS)
    cache.keys.narrow(2, start, k.shape[2]).copy_(k[:, :, :1])
    cache.values.narrow(2, start, k.shape[2]).copy_(v[:, :, :1])
    return cache.keys, cache.values


REFUSED = {
    wrapped_around: "its positions are computed by aten::remainder",
    of_its_own: r"its positions are computed by aten::where|kept in layers\.1\.cache\.count",
    differently: "computed by aten::mul|key and value are written at positions of different origin",
    twice: r"key: layers\.1\.cache\.keys is also written by aten::index_put_",
    scaled: "value does not come from a cache",
    read_by_another: "value does not come from a cache",
    read_before: r"key: layers\.1\.cache\.keys is read by aten::sum before it is written",
    sliding: r"layers\.1\.cache\.keys slides: its oldest tokens leave it",
    of_one_buffer: r"keys and values are one buffer, layers\.1\.cache\.keys",
    scattered: "scatter_ is no write at the positions of an index",
    only_keys: "value does not come from a cache",
    not_put_back: r"index_copy makes a new tensor, which is not put back into layers\.1\.cache\.keys",
    repeated: "does not write one token to each of its positions",
}

# Sizes that torch.export cannot leave open.
ONE_TOKEN = (sliding, only_keys)


def decoder_with(update) -> Decoder:
    """Two layers, of which the second one's cache is not packed."""
    model = Decoder([setitem, update], dtype=torch.float64)
    model.layers[1].cache.register_buffer("count", torch.zeros((), dtype=torch.int64))
    return model


@pytest.mark.parametrize("update", REFUSED, ids=lambda update: update.__name__)
def test_a_cache_that_cannot_be_packed_is_named_and_the_other_is_packed(update):
    program = exported(decoder_with(update), dynamic=update not in ONE_TOKEN)
    packed = apack_compile.optimize(program, plan=dense_plan())
    report = apack_compile.report(packed)
    assert [line.name for line in report.packed] == ["layers.0"]
    assert report.left[0].name == "layers.1"
    assert re.search(REFUSED[update], report.left[0].reason), report.left[0].reason
    assert "layers.1" in str(report)
    ids, chunks = token_ids(60), [1] * 20 if update in ONE_TOKEN else CHUNKS
    torch.testing.assert_close(run(packed, ids, chunks), run(program, ids, chunks))
    with pytest.raises(StrictError, match=r"strict=True, but a cache stays dense:\n  layers\.1: "):
        apack_compile.optimize(program, plan=dense_plan(), strict=True)


class Step(nn.Module):
    """One attention over a cache, without what surrounds it."""

    def __init__(self, attend, given: bool = False) -> None:
        super().__init__()
        self.attend = attend
        if not given:
            self.register_buffer("keys", torch.zeros(1, KV_HEADS, TOKENS, WIDTH))
            self.register_buffer("values", torch.zeros(1, KV_HEADS, TOKENS, WIDTH))

    def forward(self, q: Tensor, mask: Tensor, at: Tensor, keys: Tensor | None = None, values: Tensor | None = None):
        keys, values = (self.keys, self.values) if keys is None else (keys, values)
        keys[:, :, at] = q + 1
        values[:, :, at] = q - 1
        return self.attend(q, keys, values, mask)


def softcapped(q, k, v, mask):
    scores = torch.tanh(q @ k.mT / 30.0) * 30.0
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def with_weights(q, k, v, mask):
    weights = (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ v, weights


ATTENTIONS = {
    "no mask": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v), "no mask: the empty slots"),
    "is_causal": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True), "is_causal aligns"),
    "softcap": (softcapped, "softcap 30"),
    "weights": (with_weights, "attention weights are also used by output|used by aten::matmul and output"),
    "returned": (
        lambda q, k, v, mask: (F.scaled_dot_product_attention(q, k, v, attn_mask=mask), k),
        "used by output, not only by attention",
    ),
    "prefix": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k[:, :, :32], v[:, :, :32], attn_mask=mask[..., :32]),
        "slice",
    ),
}


def step_inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(1, KV_HEADS, 3, WIDTH), torch.ones(1, 1, 3, TOKENS, dtype=torch.bool), torch.arange(3)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_that_packed_state_cannot_serve_is_refused_by_name(name):
    attend, reason = ATTENTIONS[name]
    program = torch.export.export(Step(attend), step_inputs())
    with pytest.raises(ValueError, match=rf"none of its caches can be packed \(.*({reason})"):
        apack_compile.optimize(program, plan=dense_plan(1, dtype=torch.float32))


def attend_masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_keys_that_two_attentions_pair_with_other_values_are_refused():
    class Crossed(Step):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("others", torch.zeros_like(self.keys))

        def forward(self, q, mask, at):
            for buffer in (self.keys, self.values, self.others):
                buffer.index_copy_(2, at, q)
            return sum(attend_masked(q, self.keys, values, mask) for values in (self.values, self.others))

    program = torch.export.export(Crossed(), step_inputs())
    with pytest.raises(ValueError, match="its keys or values are paired with others in another attention"):
        apack_compile.optimize(program, plan=dense_plan(2, dtype=torch.float32))


def test_two_attentions_over_one_cache_read_the_same_packed_state():
    class Shared(Step):
        def forward(self, q, mask, at):
            keys, values = self.keys.index_copy_(2, at, q), self.values.index_copy_(2, at, q - 1)
            return self.attend(q, keys, values, mask) + self.attend(q * 2, keys, values, mask)

    program = torch.export.export(Shared(attend_masked), step_inputs())
    packed = apack_compile.optimize(program, plan=dense_plan(1, dtype=torch.float32), strict=True)
    found, expected = (p.module()(*step_inputs()[:1], causal_mask(), torch.arange(3)) for p in (packed, program))
    torch.testing.assert_close(found, expected)
    assert len(apack_compile.report(packed).packed) == 1


def causal_mask() -> Tensor:
    return (torch.arange(TOKENS) <= torch.arange(3)[:, None])[None, None]


def test_caches_that_are_inputs_belong_to_the_caller():
    caches = [torch.zeros(1, KV_HEADS, TOKENS, WIDTH) for _ in range(2)]
    program = torch.export.export(Step(attend_masked, given=True), (*step_inputs(), *caches))
    with pytest.raises(ValueError, match="keys is an input, not a buffer of the program"):
        apack_compile.optimize(program, plan=dense_plan(1, dtype=torch.float32))


def test_positions_that_are_constant_are_refused():
    class Fixed(Step):
        def forward(self, q, mask):
            self.keys[:, :, 3:6] = q
            self.values[:, :, 3:6] = q
            return attend_masked(q, self.keys, self.values, mask)

    program = torch.export.export(Fixed(None), step_inputs()[:2])
    with pytest.raises(ValueError, match=r"positions do not come from an input: .* always writes from slot 3 on"):
        apack_compile.optimize(program, plan=dense_plan(1, dtype=torch.float32))


def test_buffers_that_share_memory_are_refused():
    model = Step(attend_masked)
    model.values = model.keys.view_as(model.keys)
    program = torch.export.export(model, step_inputs())
    with pytest.raises(ValueError, match="index_put_ writes through values, whose place in keys is not known"):
        apack_compile.optimize(program.module(), plan=dense_plan(1, dtype=torch.float32))


def test_a_program_without_a_cache_is_refused():
    program = torch.export.export(nn.Linear(3, 3), (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match="it has no attention over a cache"):
        apack_compile.optimize(program, plan=dense_plan())


def wrong_plans():
    plan = dense_plan(dtype=torch.float32)
    config = apack_compile.AttentionPackConfig()
    ranks = dict.fromkeys(config.ranks, 8)
    fitted = replace(attentionpack_plan(range(2), ranks, 32), signature=plan.signature)
    return {
        "layers": (dense_plan(3, dtype=torch.float32), "packs 3 layers; the program has 2 caches"),
        "heads": (replace(plan, signature=(2, 4, WIDTH, "torch.float32")), r"made for .*\(4, 16, 'torch.float32'\)"),
        "dtype": (dense_plan(), r"layers\.0 has \(2, 16, 'torch.float32'\)"),
        "no room": (dense_plan(tail_slots=TOKENS, dtype=torch.float32), "64 dense newest tokens fill a cache of 64"),
        "unsigned": (lossless_plan(range(2)), "plan: signature"),
        "config": (config, "must be a Plan"),
        "fitted": (fitted, "plan: fits bases to each cache; a program needs"),
    }


@pytest.mark.parametrize("name", wrong_plans())
def test_a_plan_that_does_not_fit_is_refused(name):
    plan, message = wrong_plans()[name]
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(exported(Decoder()), plan=plan)


def test_a_plan_that_tells_coarse_tokens_apart_is_refused(statistics_of):
    statistics = statistics_of(2, KV_HEADS, WIDTH, vision=False)
    for layer in statistics.values():
        layer |= {"coarse_text": layer["text"], "fine_text": layer["text"]}
    weights = torch.zeros(feature_count(KV_HEADS, WIDTH, WIDTH))
    rule = CoarseRule("text", 0.75, dict.fromkeys(range(2), weights))
    plan = budget_plan(statistics, 4, TOKENS, 0.0, rules={"text": rule})
    plan = replace(plan, signature=(2, KV_HEADS, WIDTH, "torch.float32"))
    with pytest.raises(ValueError, match=r"plan: orders or separates tokens by importance; make it with .*coarse=\(\)"):
        apack_compile.optimize(exported(Decoder()), plan=plan)


def test_a_plan_whose_keys_rotate_by_several_coordinates_is_refused(statistics_of):
    rotation = KeyRotation(torch.ones(2), 16, coordinates=torch.tensor([0, 1]))
    plan = budget_plan(statistics_of(2, KV_HEADS, WIDTH, vision=False), 4, TOKENS, 0.0, rotation=rotation)
    plan = replace(plan, signature=(2, KV_HEADS, WIDTH, "torch.float32"))
    with pytest.raises(ValueError, match=r"plan: its keys rotate by several coordinates .*key_block=0"):
        apack_compile.optimize(exported(Decoder()), plan=plan)


def good_inputs() -> tuple[Tensor, Tensor]:
    return token_ids(60), torch.arange(60)


WRONG = {
    "neither": ({}, "calibration_inputs: a program needs them to fit bases to, or a plan"),
    "ratio alone": ({"ratio": 4}, "calibration_inputs: a program needs them"),
    "both": ({"plan": dense_plan(), "ratio": 4}, "plan: excludes ratio and calibration_inputs"),
    "preset": ({"preset": "lossless", "plan": dense_plan()}, "preset='lossless': a program takes ratio, plan"),
    "quantize": ({"quantize": "int8wo"}, "quantize='int8wo': a program takes"),
    "no call": ({"calibration_inputs": []}, "calibration_inputs: an empty list holds no call"),
    "a tensor": ({"calibration_inputs": torch.zeros(3)}, "calibration_inputs: Tensor must be a tuple"),
    "first tokens": ({"calibration_inputs": (token_ids(3), torch.arange(3))}, "layers.0 saw no token past the first 4"),
    "ratio": ({"ratio": 1, "calibration_inputs": good_inputs()}, "ratio=1 must be a finite number > 1"),
    "out of reach": ({"ratio": 99, "calibration_inputs": good_inputs()}, "ratio=99 is out of reach: .* is 10.7"),
}


@pytest.fixture(scope="module")
def program():
    return exported(Decoder())


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_a_program_cannot_take_are_named(name, program):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(program, **arguments)


def test_a_packed_program_is_not_packed_again(program):
    packed = apack_compile.optimize(program, plan=dense_plan(dtype=torch.float32))
    with pytest.raises(ValueError, match="it has no attention over a cache"):
        apack_compile.optimize(packed, plan=dense_plan(dtype=torch.float32))
    half = apack_compile.optimize(exported(decoder_with(twice)), plan=dense_plan())
    with pytest.raises(ValueError, match="none of its caches can be packed"):
        apack_compile.optimize(half, plan=dense_plan())


def test_states_past_float16_are_refused_in_calibration():
    model = Decoder()
    with torch.no_grad():
        model.layers[1].qkv.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"key states of layers\.1 reach .*, past float16's 65504"):
        apack_compile.optimize(exported(model), ratio=2, calibration_inputs=good_inputs())


def test_a_graph_module_without_shapes_needs_a_call():
    class Traceable(Step):
        def forward(self, q, mask, at):
            keys, values = self.keys.index_copy_(2, at, q), self.values.index_copy_(2, at, q)
            return attend_masked(q, keys, values, mask)

    traced = torch.fx.symbolic_trace(Traceable(None))
    with pytest.raises(ValueError, match="its graph records no shapes; pass calibration_inputs"):
        apack_compile.optimize(traced, plan=dense_plan(1, dtype=torch.float32))


def test_calibration_inputs_are_for_programs():
    with pytest.raises(ValueError, match="calibration_inputs: is for programs"):
        apack_compile.optimize(nn.Linear(2, 2), calibration_inputs=[()])
