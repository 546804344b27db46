"""transformers' own exportable module with a static cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

import apack_compile
from apack_compile import AttentionPackConfig
from apack_compile.export.find import find_caches
from apack_compile.export.observe import observe
from apack_compile.export.program import copied, graph_module_of
from apack_compile.passes.buffers.pairs import pairs_of

TOKENS, PROMPT = 256, 100
IDS = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def llama(
    dtype: torch.dtype = torch.float32, attention: str = "sdpa", spread: float = 0.2, kind: type = LlamaConfig
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = kind(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        initializer_range=spread,
        attn_implementation=attention,
    )
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": TOKENS}
    )
    return model


def exported(model: PreTrainedModel, strict: bool = True) -> torch.export.ExportedProgram:
    sizes = {1: torch.export.Dim("tokens", max=TOKENS - 1)}
    return TorchExportableModuleForDecoderOnlyLM(model).export(
        input_ids=IDS[:, :5],
        cache_position=torch.arange(5),
        dynamic_shapes={"input_ids": sizes, "cache_position": {0: sizes[1]}},
        strict=strict,
    )


def generate(program: torch.export.ExportedProgram, steps: int = 40) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after the prompt, and the last logits."""
    module, ids, tokens = program.module(), IDS[:, :PROMPT], []
    with torch.no_grad():
        logits = module(input_ids=ids, cache_position=torch.arange(PROMPT))
        for position in range(PROMPT, PROMPT + steps):
            tokens.append(int(logits[0, -1].argmax()))
            logits = module(input_ids=torch.tensor([[tokens[-1]]]), cache_position=torch.tensor([position]))
    return tokens, logits


def lossless_plan_of(model: PreTrainedModel) -> apack_compile.Plan:
    apack_compile.optimize(model, preset="lossless", compile="none")
    plan = apack_compile.plan_for(model, TOKENS)
    apack_compile.restore(model)
    return plan


@pytest.mark.parametrize("strict", [True, False])
def test_the_static_cache_is_replaced_and_tokens_stay(strict):
    model = llama(torch.float64)
    program = exported(model, strict)
    packed = apack_compile.optimize(program, plan=lossless_plan_of(model), strict=True)
    (tokens, logits), (expected, dense_logits) = generate(packed), generate(program)
    assert tokens == expected
    torch.testing.assert_close(logits, dense_logits)
    names = [line.name for line in apack_compile.report(packed).packed]
    assert names == [f"model.model.layers.{layer}.self_attn" for layer in range(2)]
    dense = [n for n, t in (*packed.state_dict.items(), *packed.constants.items()) if t.shape == (1, 2, TOKENS, 16)]
    assert dense == []


def test_attention_spelled_as_two_products_is_packed_and_one_that_rounds_to_float32_is_refused():
    model = llama(attention="eager")
    program = exported(model)
    packed = apack_compile.optimize(program, plan=lossless_plan_of(model), strict=True)
    assert generate(packed)[0] == generate(program)[0]
    model = model.double()
    with pytest.raises(ValueError, match=r"softmax computes in torch\.float32, the query is torch\.float64"):
        apack_compile.optimize(exported(model), plan=lossless_plan_of(model))


def test_a_ratio_holds_and_keys_are_rotated_back():
    model = llama(spread=0.05)
    program = exported(model)
    inputs = [{"input_ids": IDS, "cache_position": torch.arange(TOKENS - 1)}]
    inputs[0]["input_ids"] = IDS[:, : TOKENS - 1]
    packed = apack_compile.optimize(program, ratio=4, calibration_inputs=inputs)
    report = apack_compile.report(packed)
    assert report.ratio >= 4
    assert report.keys == "rotated back to the start of their block of slots"
    (_, logits), (_, dense) = generate(packed, steps=1), generate(program, steps=1)
    assert (logits - dense).norm() < 0.5 * dense.norm()


@pytest.mark.parametrize("kind", (LlamaConfig, CohereConfig))
def test_the_pairs_that_rotate_are_found_among_the_programs_buffers(kind):
    program = exported(llama(spread=0.05, kind=kind))
    watched = copied(graph_module_of(program, None))
    calls = [((), {"input_ids": IDS[:, :-1], "cache_position": torch.arange(TOKENS - 1)})]
    rotation = observe(watched, pairs_of(find_caches(watched, tried=True)[0]), calls, 4.0).rotation
    assert rotation is not None and rotation.interleaved == (kind is CohereConfig)


@pytest.mark.parametrize("kind", (LlamaConfig, CohereConfig))
def test_a_plan_calibrated_on_the_model_serves_its_program(kind):
    """The same plan, with rotated keys, costs the program about what it costs the model's own cache."""
    model = llama(kind=kind)
    program = exported(model)
    apack_compile.optimize(model, AttentionPackConfig(ratio=4, coarse=(), compile="none"))
    apack_compile.calibrate(model, {"input_ids": IDS})
    plan = apack_compile.plan_for(model, TOKENS)
    assert plan.rotation.interleaved == (kind is CohereConfig)
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(input_ids=IDS[:, :PROMPT], past_key_values=cache)
        expected = model(input_ids=IDS[:, PROMPT : PROMPT + 1], past_key_values=cache).logits
        apack_compile.restore(model)
        module = apack_compile.optimize(program, plan=plan).module()
        module(input_ids=IDS[:, :PROMPT], cache_position=torch.arange(PROMPT))
        logits = module(input_ids=IDS[:, PROMPT : PROMPT + 1], cache_position=torch.tensor([PROMPT]))
        module_of_dense = program.module()
        module_of_dense(input_ids=IDS[:, :PROMPT], cache_position=torch.arange(PROMPT))
        dense = module_of_dense(input_ids=IDS[:, PROMPT : PROMPT + 1], cache_position=torch.tensor([PROMPT]))
    assert 0 < (logits - dense).norm() < 2 * (expected - dense).norm()


def test_copies_share_parameters_and_no_buffers():
    gm = graph_module_of(exported(llama()), None)
    twin = copied(gm)
    names = dict(gm.named_buffers())
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(gm.parameters(), twin.parameters(), strict=True))
    assert {n for n, b in twin.named_buffers() if b.data_ptr() != names[n].data_ptr()} == set(names)
    assert twin.state_dict().keys() == gm.state_dict().keys()
    assert not any("key_cache" in name for name in gm.state_dict())
