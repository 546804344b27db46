"""Keys and values of an eager step: attended to as they are stored, decoded for everything else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.cache.cache import CompactedCache
from apack_compile.cache.stored_states import StoredStates
from apack_compile.generate.hooks import attention_of

HEADS, REPEATS, WIDTH, PROMPT = 2, 3, 10, 83


class Operations(TorchDispatchMode):
    """Names of our operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "apack":
            self.called.append(func._schema.name.removeprefix("apack::"))
        return func(*args, **(kwargs or {}))


def small_model(attention: str = "sdpa", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": HEADS * REPEATS, "num_key_value_heads": HEADS, "head_dim": WIDTH}
    config = LlamaConfig(vocab_size=60, num_hidden_layers=2, hidden_size=60, intermediate_size=64, **heads)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    apack_compile.optimize(model, AttentionPackConfig(compile="none", min_tokens=0, **options))
    if "ratio" in options:
        apack_compile.calibrate(model, {"input_ids": prompt(300, seed=1)})
    return model


def prompt(tokens: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step_of(new: int, rows: int = 2, watched: bool = True) -> tuple[CompactedCache, Tensor, Tensor]:
    """A filled cache, and what its first layer returns for `new` tokens more."""
    model = small_model(ratio=4)
    cache = apack_compile.new_cache(model)
    model(prompt(PROMPT, rows), past_key_values=cache)
    cache.index.is_watched = watched
    states = (torch.randn(rows, HEADS, new, WIDTH, generator=torch.Generator().manual_seed(i)) for i in (2, 3))
    return cache, *cache.update(*states, 0)


def repeated(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    five = x[:, :, None, :, :].expand(batch, heads, REPEATS, tokens, width)
    return five.reshape(batch, heads * REPEATS, tokens, width)


def repeated_in_short(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, REPEATS, -1, -1).reshape((x.shape[0], -1, *x.shape[2:])).contiguous()


def mask_of(tokens: int, new: int, dtype: torch.dtype) -> Tensor:
    """Causal, and the second row cannot see some tokens; `[2, 1, new, tokens]`."""
    seen = torch.ones(2, 1, new, tokens, dtype=torch.bool).tril(PROMPT)
    seen[1, ..., 7:20] = False
    return seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention in float64 over decoded states; heads may come as rows."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, 1) for x in (key, value))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return sdpa(query.double(), key, value, mask, scale=scale)


@pytest.mark.parametrize("dtype", (torch.bool, torch.float32))
@pytest.mark.parametrize("new", (1, 4))
@pytest.mark.parametrize("heads", (repeated, repeated_in_short, None))
def test_an_attention_reads_stored_states(heads, new, dtype):
    _, key, value = step_of(new)
    query = torch.randn(2, HEADS * REPEATS, new, WIDTH)
    mask = mask_of(key.shape[2], new, dtype)
    with Operations() as operations:
        if heads is None:
            out = sdpa(query, key, value, attn_mask=mask, enable_gqa=True, scale=0.2)
        else:
            out = sdpa(query, heads(key), heads(value), mask, scale=0.2)
    assert operations.called == ["attend"]
    torch.testing.assert_close(out.double(), exact(query, key.decoded, value.decoded, mask, 0.2), rtol=1e-4, atol=1e-5)


def test_heads_may_come_as_rows():
    _, key, value = step_of(1)
    query = torch.randn(2, HEADS, REPEATS, WIDTH)
    with Operations() as operations:
        out = sdpa(query, key, value)
    assert operations.called == ["attend"]
    held = (x.decoded[:, :, : PROMPT + 1] for x in (key, value))
    torch.testing.assert_close(out.double(), exact(query, *held, None), rtol=1e-4, atol=1e-5)


def joined(x: Tensor) -> Tensor:
    """Repeats put behind one another as tokens."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(-1, -1, REPEATS, -1, -1).reshape(batch, heads, REPEATS * tokens, width)


OTHERWISE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "causal from the first token": lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
    "values as keys": lambda q, k, v: sdpa(q, v, k, enable_gqa=True),
    "keys as values": lambda q, k, v: sdpa(q, k, k, enable_gqa=True),
    "keys changed": lambda q, k, v: sdpa(q, k * 2, v, enable_gqa=True),
    "keys changed in place": lambda q, k, v: sdpa(q, k.mul_(2), v, enable_gqa=True),
    "values cut": lambda q, k, v: sdpa(q, k[:, :, -9:], v[:, :, -9:], enable_gqa=True),
    "tiled heads": lambda q, k, v: sdpa(q, k.repeat(1, REPEATS, 1, 1), v.repeat(1, REPEATS, 1, 1)),
    "another head's": lambda q, k, v: sdpa(q, k.flip(1), v, enable_gqa=True),
    "repeats as tokens": lambda q, k, v: sdpa(q, joined(k), joined(v), enable_gqa=True),
    "by hand": lambda q, k, v: (q @ repeated(k).mT).softmax(-1) @ repeated(v),
    "three dimensions": lambda q, k, v: sdpa(q[0], *(x[0].repeat_interleave(REPEATS, 0) for x in (k, v))),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_everything_else_reads_them_decoded(name):
    query = torch.randn(2, HEADS * REPEATS, 1, WIDTH, generator=torch.Generator().manual_seed(4))
    _, key, value = step_of(1)
    with Operations() as operations:
        out = OTHERWISE[name](query, key, value)
    assert operations.called == ["unpack"], "once for both"
    _, plain_key, plain_value = step_of(1, watched=False)
    assert type(plain_key) is Tensor and isinstance(key, StoredStates)
    assert torch.equal(out, OTHERWISE[name](query, plain_key, plain_value))


def test_several_tokens_without_a_mask_see_one_another():
    query = torch.randn(2, HEADS * REPEATS, 3, WIDTH)
    _, key, value = step_of(3)
    out = sdpa(query, key, value, enable_gqa=True)
    assert torch.equal(out, sdpa(query, key.decoded, value.decoded, enable_gqa=True))


def test_values_of_another_cache_are_its_own():
    query = torch.randn(2, HEADS * REPEATS, 1, WIDTH)
    (_, key, _), (other, _, value) = step_of(1), step_of(1)
    other.packed_layers[0].first.value.add_(1)
    out = sdpa(query, key, value, enable_gqa=True)
    assert torch.equal(out, sdpa(query, key.decoded, value.decoded, enable_gqa=True))


def test_heads_are_repeated_once():
    _, key, _ = step_of(1)
    five = key[:, :, None].expand(-1, -1, REPEATS, -1, -1)
    with pytest.raises(RuntimeError, match="expanded size"):
        five.expand(-1, -1, 2 * REPEATS, -1, -1)


@pytest.mark.parametrize("written", ("key", "value"))
def test_what_was_written_to_states_is_read(written):
    states = dict(zip(("key", "value"), step_of(1)[1:], strict=True))
    query = torch.randn(2, HEADS * REPEATS, 1, WIDTH)
    states[written][:, :, 5] = 3.0
    states[written].add_(1.0)
    with Operations() as operations:
        out = sdpa(query, **states, enable_gqa=True)
    assert operations.called == []
    assert torch.equal(states[written][:, 1, 5], torch.full((2, WIDTH), 4.0))
    decoded = (x.decoded for x in states.values())
    torch.testing.assert_close(out.double(), exact(query, *decoded, None), rtol=1e-5, atol=1e-6)


def test_states_of_an_earlier_step_are_refused():
    cache, key, value = step_of(1)
    cache.update(*(torch.randn(2, HEADS, 1, WIDTH) for _ in range(2)), 1)
    cache.update(*(torch.randn(2, HEADS, 1, WIDTH) for _ in range(2)), 0)
    with pytest.raises(RuntimeError, match="layer 0: keys or values of an earlier step"):
        sdpa(torch.randn(2, HEADS, 1, WIDTH), key, value)
    with pytest.raises(RuntimeError, match="clone them"):
        key.sum()


def test_gradients_reach_the_queries():
    _, key, value = step_of(1)
    query = torch.randn(2, HEADS * REPEATS, 1, WIDTH, requires_grad=True)
    sdpa(query, key, value, enable_gqa=True).sum().backward()
    assert query.grad is not None and query.grad.any()


@pytest.mark.parametrize(
    ("options", "reads"),
    (
        ({"ratio": 4}, "attend"),
        ({"preset": "attentionpack"}, "attend_tiers"),
        ({"preset": "a-vl"}, "attend_tiers"),
        ({"preset": "snapkv"}, "attend"),
        ({"preset": "lossless"}, "unpack"),
    ),
)
@pytest.mark.parametrize("how", ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}))
def test_generate_without_a_compiler_decodes_nothing(options, reads, how):
    model = small_model(**options)
    rows = 1 if "prompt_lookup_num_tokens" in how else 2
    with Operations() as operations:
        said = model.generate(prompt(PROMPT, rows), max_new_tokens=9, do_sample=False, **how)
    assert {name for name in operations.called if name.startswith(("attend", "unpack"))} == {reads}
    if reads == "attend_tiers" or options == {"preset": "snapkv"}:
        # they see no attention that is spelled otherwise, and keep every token
        return
    decoding = small_model("eager", **options)
    with Operations() as operations:
        expected = decoding.generate(prompt(PROMPT, rows), max_new_tokens=9, do_sample=False, **how)
    assert "attend" not in operations.called and torch.equal(said, expected)


@pytest.mark.parametrize(("attention", "served"), (("sdpa", True), ("eager", False), ("flex_attention", False)))
def test_only_sdpa_gets_stored_states(attention, served):
    model = small_model(attention, preset="lossless")
    with torch.no_grad():
        cache, _, _ = step_of(1)
        cache.index.is_watched = attention_of(model) == "sdpa"
        key, _ = cache.update(*(torch.randn(2, HEADS, 1, WIDTH) for _ in range(2)), 1)
    assert isinstance(key, StoredStates) == served
