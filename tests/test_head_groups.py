"""How many head groups share bases: what is chosen, and what becomes of a calibration for another number."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.models.weights import weight_bytes
from apack_compile.plan.bits import ALIGNED, largest_ratio
from apack_compile.plan.choice import (
    LEAST_LIMIT,
    LEAST_SPEED,
    Option,
    PackedLayers,
    Weights,
    choose,
    head_groups_for,
    option,
    typical_plan,
)
from apack_compile.plan.time_model import CPU, H200, Device, Load, predicted_speedup

SHAPES = {
    "Qwen2.5-VL-7B": (28, 4, 128),
    "LLaVA-1.5-7B": (32, 32, 128),
    "SmolLM2-135M": (9, 3, 64),
    "Gemma3-4B": (8, 4, 256),
}
# All layers of these models, and their weights in 16 bits (SmolLM2: in 32).
MODELS = {
    "Qwen2.5-VL-7B": ([PackedLayers(28, 4, 128, 28)], Weights(16_584_333_312, pictures=True, coarse=True)),
    "LLaVA-1.5-7B": ([PackedLayers(32, 32, 128, 32)], Weights(14_126_854_144, pictures=True, coarse=True)),
    "SmolLM2-135M": ([PackedLayers(9, 3, 64, 30)], Weights(538_060_032, coarse=True)),
    "Gemma3-4B": (
        [PackedLayers(8, 4, 256, 5), PackedLayers(8, 4, 256, 29, has_window=True)],
        Weights(8_630_635_648, pictures=True, coarse=True),
    ),
}


def speed(shape: tuple[int, int, int], groups: int, ratio: float, device: Device) -> float:
    load = Load(*shape, device.planned_tokens, device.planned_batch, element_bytes=device.dense_bytes or 2)
    return predicted_speedup(typical_plan(*shape[1:], load.tokens, ratio, groups, 64), load, device)


def fits(shape: tuple[int, int, int], groups: int, device: Device) -> bool:
    return device.widest_basis is None or shape[1] * shape[2] // groups <= device.widest_basis


def bytes_in_16_bits(name: str, groups: int, ratio: float) -> int:
    """Bytes of the bases of all layers, of typical variances: text, pictures, and coarse text where a layer sees all tokens."""
    layers, weights = MODELS[name]
    total = 0
    for layer in layers:
        width = layer.heads * layer.head_dim // groups
        stream = typical_plan(layer.heads, layer.head_dim, 8_192, ratio, groups, 64).layers[0].text_key
        segments = 1 + weights.pictures + (ratio >= 5 and not layer.has_window)
        rank = stream.bands.components
        total += layer.count * segments * 2 * groups * (2 * width * (rank + 1) + 4 * rank)
    return total


@given(st.sampled_from(list(SHAPES.values())), st.sampled_from([3.0, 4.0, 8.0, 16.0]))
def test_no_fewer_groups_are_fast_enough_on_a_cpu(shape, ratio):
    chosen = choose([PackedLayers(*shape)], 2, ratio, 64, CPU).count
    assert shape[1] % chosen == 0
    fewer = [n for n in range(1, chosen) if shape[1] % n == 0]
    assert all(speed(shape, n, ratio, CPU) < LEAST_SPEED["balanced"] for n in fewer)
    assert speed(shape, chosen, ratio, CPU) >= LEAST_SPEED["balanced"]


def options_of(shape: tuple[int, int, int], ratio: float, whole_tiles: bool = False) -> list[Option]:
    """All that a GPU can choose from."""
    load = Load(*shape, H200.planned_tokens, H200.planned_batch)
    groups = [n for n in range(1, shape[1] + 1) if shape[1] % n == 0 and shape[1] * shape[2] // n <= H200.widest_basis]
    reachable = [n for n in groups if largest_ratio(shape[1] * shape[2] // n) >= ratio]
    return [option([load], ratio, n, block, H200, whole_tiles) for n in reachable for block in H200.key_blocks]


@given(st.sampled_from(list(SHAPES.values())), st.sampled_from([4.0, 8.0, 16.0]))
def test_a_gpu_takes_what_loses_least_of_what_is_near_its_byte_limit(shape, ratio):
    options = options_of(shape, ratio)
    by_choice = {(one.groups, one.key_block): one for one in options}
    found = {
        prefer: choose([PackedLayers(*shape)], 2, ratio, None, H200, prefer=prefer)
        for prefer in ("quality", "balanced", "speed")
    }
    own = {prefer: by_choice[groups.count, groups.key_block] for prefer, groups in found.items()}
    fastest = max(options_of(shape, ratio, whole_tiles=True), key=lambda one: one.speed)
    assert (found["speed"].count, found["speed"].key_block) == (fastest.groups, fastest.key_block)
    assert own["quality"].harm <= own["balanced"].harm
    for prefer, least in (("quality", 0.5), ("balanced", 0.8)):
        fastest_of_all = max(one.speed for one in options)
        near = [one for one in options if one.share >= least or one.speed >= least * fastest_of_all]
        assert own[prefer].harm == min(one.harm for one in near)


def test_a_gpu_says_what_its_choice_costs():
    found = choose([PackedLayers(*SHAPES["Gemma3-4B"])], 2, 8.0, None, H200)
    assert f"keys rotated back by blocks of {found.key_block}" in found.reason
    assert "of the byte limit. Predicted harm: " in found.reason
    alone = choose([PackedLayers(*SHAPES["Gemma3-4B"])], 2, 8.0, 128, H200)
    assert alone.key_block == 128 and "harm" not in alone.reason
    assert choose([PackedLayers(*SHAPES["Gemma3-4B"])], 2, 8.0, None, H200, groups=4).count == 4
    # a CPU has one block to choose from
    assert choose([PackedLayers(*SHAPES["Gemma3-4B"])], 4, 8.0, None, CPU).key_block == 64


def test_few_heads_share_one_basis_and_many_do_not_on_a_cpu():
    found = {
        name: [choose([PackedLayers(*shape)], 4, ratio, 64, CPU).count for ratio in (4, 8, 16)]
        for name, shape in SHAPES.items()
    }
    assert found["SmolLM2-135M"] == [1, 1, 1]
    assert found["LLaVA-1.5-7B"][0] > found["LLaVA-1.5-7B"][1] > 1
    assert found["Qwen2.5-VL-7B"][0] > found["Qwen2.5-VL-7B"][2] == 1


def test_a_basis_is_no_wider_than_a_device_takes():
    assert SHAPES["LLaVA-1.5-7B"][1:] == (32, 128) and H200.widest_basis == 2_048
    found = choose([PackedLayers(*SHAPES["LLaVA-1.5-7B"])], 2, 8.0, 64, H200)
    assert found.count == 8 and "no basis is wider than 2,048" in found.reason
    narrow = replace(H200, widest_basis=100)
    assert choose([PackedLayers(*SHAPES["LLaVA-1.5-7B"])], 2, 8.0, 64, narrow).count == 32
    assert "wider" not in choose([PackedLayers(*SHAPES["Qwen2.5-VL-7B"])], 2, 8.0, 64, H200).reason


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("device", [CPU, H200], ids=lambda device: device.name)
def test_the_bases_of_all_layers_weigh_at_most_3_percent_of_the_weights(name, ratio, device):
    layers, weights = MODELS[name]
    found = choose(layers, 2, ratio, 64, device, weights)
    assert weights.limit == int(0.03 * weights.bytes)
    assert bytes_in_16_bits(name, found.count, ratio) <= weights.limit
    without = choose(layers, 2, ratio, 64, device)
    heavy = bytes_in_16_bits(name, without.count, ratio) > weights.limit
    assert found.count > without.count if heavy else found.count >= without.count
    assert ("weigh more than 3% of the model's weights" in found.reason) >= heavy


def test_what_the_weights_allow_is_chosen_and_said():
    layers, weights = MODELS["LLaVA-1.5-7B"]
    found = choose(layers, 2, 8.0, 64, CPU, weights)
    assert found.count == 16
    said = "; with fewer groups, shared bases would weigh more than 3% of the model's weights, 423,805,624 bytes"
    assert found.reason.endswith(said)
    twice = choose(layers, 4, 8.0, 64, CPU, replace(weights, bytes=2 * weights.bytes))
    assert twice.count == 8
    assert "weigh" not in choose(*MODELS["SmolLM2-135M"][:1], 4, 8.0, 64, CPU, MODELS["SmolLM2-135M"][1]).reason


def test_where_no_number_of_groups_is_light_there_are_as_many_as_can_be():
    layers, weights = MODELS["LLaVA-1.5-7B"]
    found = choose(layers, 2, 4.0, 64, CPU, replace(weights, bytes=weights.bytes // 8))
    assert found.count == 32
    assert "; with any number of groups, shared bases would weigh more than 3% of the model's weights" in found.reason
    assert choose(layers, 2, 8.0, 64, CPU, replace(weights, bytes=weights.bytes // 4)).count == 32


def test_heads_that_cannot_be_halved_and_a_single_head_keep_to_the_weights_too():
    odd = [PackedLayers(18, 9, 64, 20)]
    fast = replace(CPU, matrix_operations=1e15)
    found = {n: choose(odd, 2, 4.0, 64, fast, Weights(n * 10**6)).count for n in (2_000, 700, 100)}
    assert found == {2_000: 1, 700: 3, 100: 9}
    one = choose([PackedLayers(71, 1, 64, 400)], 2, 4.0, 64, CPU, Weights(10**8))
    assert one.count == 1 and "with any number of groups" in one.reason
    mixed = [PackedLayers(8, 4, 64, 300), PackedLayers(6, 6, 64, 300)]
    assert choose(mixed, 2, 4.0, 64, CPU, Weights(5 * 10**9)).count == 2


def test_small_models_may_have_a_mebibyte_of_bases():
    layers = [PackedLayers(4, 4, 16, 2)]
    assert choose(layers, 4, 4.0, 64, CPU, Weights(10**5)).count == 1
    found = choose([PackedLayers(4, 4, 64, 8)], 4, 4.0, 64, CPU, Weights(10**5))
    assert found.count > 1 and f"more than {LEAST_LIMIT:,} bytes, which any model is granted" in found.reason


def test_the_weights_count_on_devices_without_figures_too():
    layers, weights = MODELS["LLaVA-1.5-7B"]
    assert head_groups_for(layers, torch.bfloat16, 8.0, 64, "mps").count == 1
    found = head_groups_for(layers, torch.bfloat16, 8.0, 64, "mps", weights)
    assert found.count == 16 and found.reason.startswith("the time model has no figures for mps; with fewer groups")


def test_groups_divide_the_heads_of_every_layer():
    slow = replace(CPU, matrix_operations=1e9)
    assert choose([PackedLayers(8, 4, 64), PackedLayers(6, 6, 64)], 4, 4.0, 64, slow).count == 2
    assert choose([PackedLayers(71, 1, 64)], 4, 4.0, 64, slow).count == 1


def test_where_none_is_fast_enough_the_fastest_is_taken():
    slow = replace(CPU, matrix_operations=1e9)
    speeds = {n: speed((8, 8, 64), n, 4.0, slow) for n in (1, 2, 4, 8)}
    assert max(speeds.values()) < LEAST_SPEED["balanced"]
    assert choose([PackedLayers(8, 8, 64)], 4, 4.0, 64, slow).count == max(speeds, key=lambda n: speeds[n])


def test_groups_that_cannot_reach_the_ratio_are_left_out():
    slow = replace(CPU, matrix_operations=1e9)
    assert largest_ratio(16) < 8 < largest_ratio(32)
    assert choose([PackedLayers(4, 4, 16)], 4, 8.0, 64, slow).count == 2
    assert choose([PackedLayers(4, 4, 16)], 4, 4.0, 64, slow).count == 4


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("ratio", (3.0, 8.0))
def test_a_typical_plan_keeps_the_byte_budget(ratio, groups):
    plan = typical_plan(8, 64, 8_192, ratio, groups, 64)
    held = sum(groups * (stream.bands.token_bytes + 2) for stream in plan.layers[0].streams[2:])
    # bits are given to runs of 16 components
    assert 0.93 <= held * ratio / (2 * 2 * 8 * 64) <= 1.0
    assert plan.groups == groups and plan.rotation.block == 64


def many_heads() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(num_attention_heads=16, num_key_value_heads=16, head_dim=64, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


def prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 64, (1, 300), generator=torch.Generator().manual_seed(seed))}


def test_a_model_of_many_heads_gets_groups_and_the_report_says_why():
    model = apack_compile.optimize(many_heads(), ratio=4, compile="none", min_tokens=0)
    assert apack_compile.report(model).head_groups == ""
    apack_compile.calibrate(model, prompt())
    weights = Weights(weight_bytes(model), coarse=True)
    layers = [PackedLayers(16, 16, 64, model.config.num_hidden_layers)]
    groups = choose(layers, 4, 4.0, 64, CPU, weights).count
    assert groups > 1 and apack_compile.plan_for(model, 300).groups == groups
    said = apack_compile.report(model).head_groups
    assert said.startswith(f"{groups}; predicted speed over a dense cache (ratio 4, 8,192 tokens, batch 1, CPU): ")
    assert f"head groups: {said}" in str(apack_compile.report(model))
    out = model.generate(**prompt(1), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 305) and apack_compile.report(model).bytes["ratio"] > 2.5


def test_a_calibration_for_other_groups_is_not_used_silently():
    model = apack_compile.optimize(many_heads(), ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt())
    before = apack_compile.plan_for(model, 300).groups
    apack_compile.optimize(model, ratio=5, compile="none", min_tokens=0)
    assert apack_compile.plan_for(model, 300).groups == before
    one = AttentionPackConfig(ratio=4, head_groups=1, compile="none", min_tokens=0)
    apack_compile.optimize(model, one)
    lost = f"the earlier calibration cannot be used (it was made with head_groups={before})"
    assert any(note.startswith(lost) for note in apack_compile.report(model).notes)
    with pytest.raises(RuntimeError, match="no calibrated statistics"):
        apack_compile.plan_for(model, 300)
    apack_compile.calibrate(model, prompt())
    assert apack_compile.plan_for(model, 300).groups == 1
    assert apack_compile.report(model).head_groups == "1; as configured"
    assert not any("calibrated before" in note for note in apack_compile.report(model).notes)
    apack_compile.optimize(model, preset="lossless", compile="none")
    apack_compile.optimize(model, one)
    assert apack_compile.plan_for(model, 300).groups == 1


def test_what_needs_no_calibration_does_not_ask_for_one():
    model = apack_compile.optimize(
        many_heads(), AttentionPackConfig(ratio=4, key_block=16, compile="none", min_tokens=0)
    )
    apack_compile.calibrate(model, prompt())
    plan = apack_compile.plan_for(model, 300)
    apack_compile.optimize(model, preset="lossless", compile="none")
    assert apack_compile.report(model).notes == ()
    apack_compile.optimize(model, AttentionPackConfig(ratio=4, key_block=16, compile="none", min_tokens=0))
    apack_compile.calibrate(model, prompt())
    apack_compile.optimize(model, plan=plan, compile="none")
    assert apack_compile.report(model).notes == ()


def test_a_calibration_that_fails_keeps_what_was_there():
    model = apack_compile.optimize(many_heads(), ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, prompt())
    said = apack_compile.report(model).head_groups
    with pytest.raises(ValueError, match="no usable token"):
        apack_compile.calibrate(model, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    assert apack_compile.report(model).head_groups == said and apack_compile.plan_for(model, 300).groups > 1


class StaticDecoder(torch.nn.Module):
    """Logits `[1, n, 64]` of ids `[1, n]` written at positions `at`, over static buffers of 16 KV heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(64, 64)
        self.qkv, self.out = torch.nn.Linear(64, 3 * 1024), torch.nn.Linear(1024, 64)
        self.register_buffer("keys", torch.zeros(1, 16, 400, 64))
        self.register_buffer("values", torch.zeros(1, 16, 400, 64))
        self.register_buffer("causal", torch.ones(400, 400, dtype=torch.bool).tril())
        self.requires_grad_(False)

    def forward(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = (part.unflatten(-1, (16, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.keys[:, :, at] = k
        self.values[:, :, at] = v
        mask = self.causal[None, None, at]
        y = torch.nn.functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)) @ self.embedding.weight.T


def logits_of(step, lengths=(300, 1, 1, 1)) -> torch.Tensor:
    """Logits of a prompt and of three steps after it."""
    ids, start, found = prompt(2)["input_ids"].repeat(1, 2)[:, : sum(lengths)], 0, []
    for count in lengths:
        part = ids[:, start : start + count].clone(memory_format=torch.contiguous_format)
        found.append(step(part, torch.arange(start, start + count)))
        start += count
    return torch.cat(found, 1)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected)[:, 300:].norm() / expected[:, 300:].norm())


BESIDE = Weights(weight_bytes(StaticDecoder()))
GROUPS_OF_BUFFERS = choose([PackedLayers(16, 16, 64)], 4, 6.0, 0, CPU, BESIDE).count


@torch.no_grad()
def test_a_program_of_many_heads_gets_groups():
    model = StaticDecoder()
    sizes = torch.export.Dim("n", max=399)
    inputs = torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)
    program = torch.export.export(model, inputs, dynamic_shapes=({1: sizes}, {0: sizes}))
    calls = prompt()["input_ids"], torch.arange(300)
    packed = apack_compile.optimize(program, ratio=6, calibration_inputs=calls)
    codes = [t for name, t in packed.named_buffers() if t.dtype == torch.uint8 and t.shape[-2] > 1]
    assert {t.shape[1] for t in codes} == {GROUPS_OF_BUFFERS} and GROUPS_OF_BUFFERS > 1
    found, expected = logits_of(packed.module()), logits_of(program.module())
    assert 1e-6 < error_of(found, expected) < 0.4


@torch.no_grad()
def test_packed_buffers_of_many_heads_get_groups():
    torch._dynamo.reset()
    log, model = apack_compile.GraphLog(), StaticDecoder()
    options = {"own_cache": True, "inner": "eager", "strict": True, "log": log, "ratio": 6}
    found = logits_of(torch.compile(model, backend="attentionpack", fullgraph=True, options=options))
    (plan,) = log.plans
    assert plan.groups == GROUPS_OF_BUFFERS
    assert 1e-6 < error_of(found, logits_of(StaticDecoder())) < 0.4


def test_plans_can_be_made_for_another_device():
    model, reasons = many_heads(), {}
    for device in ("cpu", "cuda"):
        config = AttentionPackConfig(ratio=5, planned_device=device, compile="none", min_tokens=0)
        apack_compile.calibrate(apack_compile.optimize(model, config), prompt())
        reasons[device] = apack_compile.report(model).head_groups
        apack_compile.calibrate(apack_compile.optimize(model, replace(config, head_groups=4)), prompt())
        plan = apack_compile.plan_for(model, 300)
        aligned = [
            stream.bands.token_bytes % ALIGNED == 0 for layer in plan.layers.values() for stream in layer.streams
        ]
        assert all(aligned) == (device == "cuda")
    assert "CPU" in reasons["cpu"] and "H200" in reasons["cuda"]


@pytest.mark.parametrize("wrong", ({"prefer": "fast"}, {"planned_device": "tpu"}, {"key_block": -1}))
def test_what_plans_are_made_for_is_checked(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        AttentionPackConfig(**wrong)
