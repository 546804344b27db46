"""Quantized linear layers: calibration through them, what is refused, and what the report says of them."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

import apack_compile
from apack_compile.calibration.sensitivity import draw_gradients, observe
from apack_compile.calibration.straight_through import straight_through
from apack_compile.generate.quantize import quantized_layers
from apack_compile.generate.session import session_of
from apack_compile.models.weights import weight_bytes

torchao = pytest.importorskip("torchao.quantization", reason="torchao is an extra")

IDS = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS}
LINEAR = 14


def llama(hidden: int = 96, intermediate: int = 160) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def calibrated(model: LlamaForCausalLM, quantize=None) -> LlamaForCausalLM:
    apack_compile.optimize(model, ratio=4, quantize=quantize, compile="none", min_tokens=0)
    return apack_compile.calibrate(model, INPUTS)


def harms(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """What dropping each component of each stream costs, as calibration saw it."""
    return [stream.weights for layer in session_of(model).calibration.statistics.values() for stream in layer["text"]]


def without_gradients(model: LlamaForCausalLM) -> str:
    notes = [note for note in apack_compile.report(model).notes if "without gradients" in note]
    return notes[0] if notes else ""


@pytest.mark.parametrize(
    "quantize", ["int8wo", "int8dq", torchao.Int8DynamicActivationIntxWeightConfig()], ids=["int8wo", "int8dq", "8da4w"]
)
def test_a_model_that_optimize_quantized_calibrates_as_it_did_before(quantize):
    expected, found = harms(calibrated(llama())), harms(calibrated(llama(), quantize))
    assert quantized_layers(calibrated(llama(), quantize)).total() == LINEAR
    for harm, wanted in zip(found, expected, strict=True):
        assert float(harm.sum()) == pytest.approx(float(wanted.sum()), rel=0.05)
        both = torch.stack([harm.flatten(), wanted.flatten()]).log()
        assert float(torch.corrcoef(both)[0, 1]) > 0.8


@pytest.mark.parametrize("whole", [False, True], ids=["decoder", "output head too"])
def test_layers_that_round_what_they_are_given_pass_gradients_on(whole):
    model = llama()
    torchao.quantize_(model if whole else model.model, torchao.Int8DynamicActivationInt8WeightConfig())
    seen = observe(model, INPUTS, [0, 1])
    drawn: dict[tuple[int, int], bool] = {}
    reason = draw_gradients(seen, lambda layer, stream, gradient: drawn.update({(layer, stream): bool(gradient.any())}))
    assert reason is None and drawn == dict.fromkeys(product(range(2), range(2)), True)


def test_the_gradient_of_a_layer_that_rounds_is_that_of_its_dequantized_weight():
    layer, factors = nn.Sequential(nn.Linear(96, 40)), torch.randn(2, 5, 40)
    torchao.quantize_(layer, torchao.Int8DynamicActivationInt8WeightConfig())
    states = torch.randn(2, 5, 96, requires_grad=True)
    with straight_through(layer):
        output = layer(states)
        (found,) = torch.autograd.grad((output * factors).sum(), states)
    assert torch.equal(output, layer(states))
    torch.testing.assert_close(found, factors @ layer[0].weight.dequantize())


def test_gradients_of_weights_that_alone_are_quantized_are_those_of_torchao():
    model = llama().model.layers[0].mlp
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    states = torch.randn(2, 5, 96, requires_grad=True)
    (expected,) = torch.autograd.grad(model(states).sin().sum(), states)
    with straight_through(model):
        output = model(states)
        (found,) = torch.autograd.grad(output.sin().sum(), states)
        with torch.no_grad():
            assert torch.equal(model(states), output)
    torch.testing.assert_close(found, expected)
    assert not model.up_proj._forward_hooks and not model.up_proj._forward_pre_hooks


@torch.library.custom_op("apack_tests::scaled", mutates_args=())
def scaled(states: torch.Tensor) -> torch.Tensor:
    return states * 1.5


class WithoutBackward(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return scaled(self.inner(states))


def test_layers_without_a_backward_calibrate_without_gradients_and_the_report_says_so():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj = WithoutBackward(layer.self_attn.o_proj)
    calibrated(model)
    assert "calibrate before the weights are quantized" in without_gradients(model)
    assert "components of a stream count alike" in without_gradients(model)
    for stream in (stream for layer in session_of(model).calibration.statistics.values() for stream in layer["text"]):
        variance = stream.spectrum.deviation[0].square()
        torch.testing.assert_close(stream.weights, variance / variance.sum())
    dense = copy.deepcopy(apack_compile.restore(copy.deepcopy(model)))
    packed = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    assert packed.shape == dense.generate(input_ids=IDS, max_new_tokens=8, do_sample=False).shape
    assert apack_compile.report(model).bytes["tokens"] == 307


def test_a_model_made_in_inference_mode_calibrates_without_gradients():
    with torch.inference_mode():
        model = llama()
    assert "Inference tensors" in without_gradients(calibrated(model))


def test_gradients_that_are_all_zero_are_none():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: output.detach())
    assert "all of them are 0" in without_gradients(calibrated(model))


def test_inputs_too_short_for_gradients_are_noted():
    model = apack_compile.optimize(llama(), ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": IDS[:, :7]})
    assert "calibrate on longer ones" in without_gradients(model)
    apack_compile.calibrate(model, [{"input_ids": IDS[:, :7]}, INPUTS])
    assert not without_gradients(model)


def test_the_note_goes_with_the_calibration_to_the_next_optimize():
    with torch.inference_mode():
        model = llama()
    calibrated(model)
    apack_compile.optimize(model, ratio=6, compile="none", min_tokens=0)
    assert without_gradients(model)
    apack_compile.optimize(model, preset="lossless", compile="none")
    assert not without_gradients(model)


def by_user(model: LlamaForCausalLM, folder) -> LlamaForCausalLM:
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    return model


def by_transformers(model: LlamaForCausalLM, folder) -> LlamaForCausalLM:
    model.save_pretrained(folder)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


def by_optimize(model: LlamaForCausalLM, folder) -> LlamaForCausalLM:
    return apack_compile.restore(
        apack_compile.optimize(model, ratio=4, quantize="int8wo", compile="none", min_tokens=0)
    )


@pytest.mark.parametrize("quantized", [by_user, by_transformers, by_optimize])
def test_weights_that_are_quantized_already_are_not_quantized_again(quantized, tmp_path):
    model = quantized(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"quantize='int8wo': .* quantized already \(14 torchao Int8Tensor\)"):
        apack_compile.optimize(model, ratio=4, quantize="int8wo", min_tokens=0)
    assert "generate" not in vars(model)
    report = apack_compile.report(apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0))
    assert (report.quantized_layers, report.quantized_by) == (LINEAR, {"torchao Int8Tensor": LINEAR})
    assert "linear layers of the language model: 14 torchao Int8Tensor" in str(report)


def test_a_package_that_torchao_needs_is_named():
    model = llama(hidden=128, intermediate=256)
    try:
        torchao.quantize_(nn.Linear(128, 128), torchao.Int4WeightOnlyConfig())
    except ImportError:
        with pytest.raises(ImportError, match=r"quantize='int4wo': .*; pip install mslk-cuda"):
            apack_compile.optimize(model, ratio=4, quantize="int4wo", min_tokens=0)
        assert not quantized_layers(model) and "generate" not in vars(model)
    else:
        pytest.skip("torchao needs nothing else here")


def test_layers_that_torchao_leaves_as_they_are_are_said():
    with pytest.raises(ValueError, match=r"quantize='int4wo': torchao leaves every linear layer .* Linear\(96, 48\)"):
        apack_compile.optimize(llama(), ratio=4, quantize="int4wo", min_tokens=0)
    model = llama()
    torchao.quantize_(model.model.layers[0], torchao.Int8WeightOnlyConfig())
    report = apack_compile.report(apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0))
    assert report.quantized_layers == 7
    assert report.quantized_by == {"torchao Int8Tensor": 7, "not quantized": 7}


def test_an_error_of_one_layer_leaves_all_as_they_were():
    model = llama(intermediate=80)
    config = torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32))
    torchao.quantize_(nn.Linear(96, 80), config)
    with pytest.raises(ValueError, match=r"quantize=IntxWeightOnlyConfig: torchao cannot .* Linear\(80, 96\)"):
        apack_compile.optimize(model, ratio=4, quantize=config, min_tokens=0)
    assert not quantized_layers(model) and "generate" not in vars(model)


def test_the_layers_of_an_adapter_are_not_quantized():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    model = adapted.get_base_model()
    apack_compile.optimize(model, ratio=4, quantize="int8wo", compile="none", min_tokens=0)
    assert apack_compile.report(model).quantized_layers == LINEAR
    assert type(model.model.layers[0].self_attn.q_proj.lora_A["default"].weight) is nn.Parameter


def test_steps_that_transformers_does_not_compile_are_reported_so():
    model = apack_compile.optimize(llama(), preset="lossless", compile="eager")
    assert apack_compile.report(model).compile == "eager"
    # what loading a model with bitsandbytes leaves on it
    model.hf_quantizer = Bnb8BitHfQuantizer(BitsAndBytesConfig(load_in_8bit=True))
    model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    report = apack_compile.report(model)
    assert report.compile == "none" and not report.graphs
    assert "transformers compiles no step of a model that bitsandbytes quantized" in report.compile_reason
    assert all(line.reason == "decode is not compiled" for line in report.layers)


def test_a_decoder_without_linear_layers_is_named():
    config = GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match=r"quantize='int8wo': the decoder has no torch\.nn\.Linear layer"):
        apack_compile.optimize(GPT2LMHeadModel(config).eval(), ratio=3, quantize="int8wo", min_tokens=0)


def test_the_bytes_of_quantized_weights_are_those_that_are_stored():
    model, expected = llama(), weight_bytes(llama())
    assert expected == sum(p.nbytes for p in model.parameters())
    kept = model.model.embed_tokens.weight.nbytes + model.lm_head.weight.nbytes
    calibrated(model, "int8wo")
    assert kept < weight_bytes(model) < kept + 0.3 * (expected - kept)
    assert apack_compile.report(model).weight_bytes == weight_bytes(model)
    assert session_of(model).calibration.weight_bytes == weight_bytes(model)
    model.model.layers[0].mlp.up_proj.register_buffer("packed", torch.zeros(1_000, dtype=torch.int32))
    model.register_buffer("mask", torch.zeros(1_000))
    assert apack_compile.report(model).weight_bytes == session_of(model).calibration.weight_bytes + 4_000


def test_a_calibration_from_before_weights_were_quantized_is_kept():
    model = calibrated(llama())
    before = session_of(model).calibration
    apack_compile.optimize(model, ratio=4, quantize="int8wo", compile="none", min_tokens=0)
    assert session_of(model).calibration is before and before.weight_bytes > weight_bytes(model)
