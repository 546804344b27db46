"""Adapters and wrappers around an optimized model: PEFT, `torch.compile`, DataParallel, and modules that hold a model.

DistributedDataParallel is in test_two_processes.py."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import apack_compile

peft = pytest.importorskip("peft", reason="peft is a development dependency")

IDS = torch.randint(3, 90, (2, 300), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :20] = 0
LORA = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
IA3 = peft.IA3Config(
    task_type="CAUSAL_LM",
    target_modules=["k_proj", "v_proj", "down_proj"],
    feedforward_modules=["down_proj"],
    init_ia3_weights=False,
)
PROMPT = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
P_TUNING = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
PREFIX = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
ADAPTERS = "adapters were added, removed or switched after the bases were calibrated"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def adapted(config) -> nn.Module:
    return peft.get_peft_model(llama(), config).eval()


def greedy(model, tokens: int = 8) -> torch.Tensor:
    return model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=tokens, do_sample=False)


def noted(model, text: str) -> bool:
    return any(text in note for note in apack_compile.report(model).notes)


@pytest.mark.parametrize("compile", ["none", "eager"])
@pytest.mark.parametrize("config", [LORA, IA3, PROMPT, P_TUNING], ids=lambda config: type(config).__name__)
def test_an_adapted_model_gives_the_tokens_of_its_dense_cache(config, compile):
    model = adapted(config)
    dense = greedy(model)
    assert apack_compile.optimize(model, preset="lossless", compile=compile) is model
    assert torch.equal(greedy(model), dense)
    report = apack_compile.report(model)
    assert report.bytes["tokens"] >= 2 * 307
    learns_a_prompt = config in (PROMPT, P_TUNING)
    assert noted(model, "prepare_inputs_for_generation was replaced") == learns_a_prompt
    assert len(report.graphs) == (compile == "eager" and not learns_a_prompt)
    apack_compile.restore(model)
    assert torch.equal(greedy(model), dense) and "generate" not in vars(model.get_base_model())


@pytest.mark.parametrize("config", [LORA, PROMPT], ids=lambda config: type(config).__name__)
def test_an_adapted_model_generates_from_a_lossy_cache(config):
    model = apack_compile.optimize(adapted(config), ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": IDS, "attention_mask": MASK})
    assert greedy(model).shape == (2, 308)
    assert apack_compile.report(model).bytes["ratio"] > 2
    assert apack_compile.plan_for(model, 300).bases and not apack_compile.new_cache(model).is_filled


def test_prefix_tuning_keeps_its_own_cache_and_the_report_says_so():
    model = adapted(PREFIX)
    dense = greedy(model)
    for setting in ({"preset": "lossless"}, {"ratio": 4}):
        apack_compile.optimize(model, **setting, compile="none", min_tokens=0)
        assert torch.equal(greedy(model), dense)
        assert noted(model, "PEFT's PREFIX_TUNING hands the model a cache of its own")
    # without the adapter around it the same model packs
    base = model.get_base_model()
    greedy(base)
    assert not noted(base, "PREFIX_TUNING") and apack_compile.report(base).bytes["tokens"] == 2 * 307


def test_a_model_goes_on_compiled_after_an_adapter_of_a_learned_prompt():
    model = apack_compile.optimize(llama(), preset="lossless", compile="eager")
    dense = greedy(apack_compile.restore(llama()))
    greedy(peft.get_peft_model(model, PROMPT).eval())
    assert not apack_compile.report(model).graphs
    assert torch.equal(greedy(model), dense) and apack_compile.report(model).graphs


def add_by_peft(model):
    return peft.get_peft_model(model, LORA)


def add_in_place(model):
    # what transformers' add_adapter and load_adapter do
    return peft.inject_adapter_in_model(LORA, model)


@pytest.mark.parametrize("add", [add_by_peft, add_in_place])
@pytest.mark.parametrize("by_plan", [False, True], ids=["calibrated", "plan"])
def test_an_adapter_added_after_calibration_is_noted(add, by_plan):
    model = apack_compile.optimize(llama(), ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": IDS})
    if by_plan:
        apack_compile.optimize(model, plan=apack_compile.plan_for(model, 300), compile="none")
    assert not apack_compile.report(model).notes
    wrapped = add(model)
    greedy(model, 2)
    assert noted(model, ADAPTERS) and noted(wrapped, ADAPTERS)
    assert noted(model, "pass a plan made with these" if by_plan else "call calibrate again")
    if not by_plan:
        apack_compile.calibrate(wrapped, {"input_ids": IDS})
        assert not noted(model, ADAPTERS)


def test_an_adapter_that_is_switched_or_taken_out_after_calibration_is_noted(tmp_path):
    model = adapted(LORA)
    model.save_pretrained(tmp_path)
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": IDS})
    with model.disable_adapter():
        assert noted(model, ADAPTERS)
    assert not noted(model, ADAPTERS)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert noted(model, ADAPTERS)
    apack_compile.calibrate(model, {"input_ids": IDS})
    assert not noted(model, ADAPTERS)
    base = model.merge_and_unload()
    assert noted(base, ADAPTERS)


def test_adapters_concern_no_preset():
    model = apack_compile.optimize(llama(), preset="lossless", compile="none")
    assert not apack_compile.report(peft.get_peft_model(model, LORA)).notes


def test_a_compiled_model_is_optimized_inside():
    model = llama()
    dense, compiled = greedy(model), torch.compile(model, backend="eager")
    assert apack_compile.optimize(compiled, preset="lossless", compile="none") is compiled
    assert torch.equal(greedy(compiled), dense)
    assert apack_compile.report(compiled).bytes == apack_compile.report(model).bytes
    adapter = torch.compile(adapted(LORA), backend="eager")
    greedy(apack_compile.optimize(adapter, preset="lossless", compile="none"))
    assert apack_compile.report(adapter).bytes["tokens"] == 2 * 307


class Composite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = llama()
        self.config = self.language_model.config

    def generate(self, *args, **kwargs):
        return self.language_model.generate(*args, **kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(llama()), r"DataParallel has no generate\(\); pass its \.module, a LlamaForCausalLM"),
        (lambda: nn.Sequential(llama()), r"Sequential has no generate\(\); pass its \.0, a LlamaForCausalLM"),
        (Composite, r"Composite has a generate\(\) of its own, .*; pass its \.language_model, a LlamaForCausalLM"),
        (lambda: AutoModel.from_config(llama().config), r"LlamaModel has no generate\(\); pass a transformers"),
    ],
)
def test_a_module_that_holds_a_model_is_refused_with_where_it_is(make, message):
    with pytest.raises(ValueError, match=f"^model: {message}"):
        apack_compile.optimize(make(), ratio=4, min_tokens=0)


def test_a_report_of_a_module_that_holds_a_model_says_where_it_is():
    composite = Composite()
    apack_compile.optimize(composite.language_model, preset="lossless", compile="none")
    with pytest.raises(ValueError, match=r"this Composite is not optimized.*; pass its \.language_model"):
        apack_compile.report(composite)
    assert torch.equal(greedy(composite), greedy(llama()))
