"""Linear layers in float32 become `apack::linear`; all others stay as they are."""

import pytest
import torch
import torch.nn.functional as F
from capture import capture
from saved_plans import llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile.backend import backend as backend_module
from apack_compile.kernels.linear.cpu import onednn_is_faster
from apack_compile.passes import LinearThroughOneDnn, run_passes

PASSES = (LinearThroughOneDnn(),)


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def inputs(dtype=torch.float32):
    """States `[2, 3, 7]`, a weight `[5, 7]`, a bias."""
    return tuple(torch.randn(*size).to(dtype) for size in ((2, 3, 7), (5, 7), (5,)))


def plain(x, weight, bias):
    return F.linear(x, weight)


def with_bias(x, weight, bias):
    return F.linear(x, weight, bias)


def by_name(x, weight, bias):
    return F.linear(bias=bias, weight=weight, input=x * 2).relu()


@pytest.mark.parametrize("function", [plain, with_bias, by_name])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_in_float32_is_computed_by_the_operation(function, dynamic):
    captured = capture(function, *inputs(), dynamic=dynamic)
    (expected,), _ = captured.run()
    record = run_passes(captured.gm, PASSES)
    assert len(record.linear_layers) == captured.count("apack::linear") == 1 and captured.count("linear") == 0
    (out,), _ = captured.run()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_stays(dtype):
    captured = capture(with_bias, *inputs(dtype))
    assert run_passes(captured.gm, PASSES).linear_layers == () and captured.count("linear") == 1


def test_autocast_stays():
    def cast(x, weight, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, weight, bias)

    captured = capture(cast, *inputs())
    assert run_passes(captured.gm, PASSES).linear_layers == ()


def test_a_layer_that_needs_a_gradient_stays():
    x, weight, bias = inputs()
    with torch.enable_grad():
        captured = capture(lambda x: F.linear(x * 1, weight, bias), x.requires_grad_())
    assert run_passes(captured.gm, PASSES).linear_layers == ()


def test_a_quantized_weight_stays():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is an extra")
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    quantization.quantize_(layers[0], quantization.Int8WeightOnlyConfig())
    captured = capture(layers, torch.randn(3, 64))
    assert len(run_passes(captured.gm, PASSES).linear_layers) == 1


def test_the_backend_computes_all_layers_of_a_model_so_where_it_is_faster():
    assert (LinearThroughOneDnn() in backend_module.PASSES) == onednn_is_faster()
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, vocab_size=97
    )
    model = LlamaForCausalLM(config).eval()
    log = apack_compile.GraphLog()
    step = torch.compile(model, backend="attentionpack", options={"log": log, "inner": "aot_eager"})
    tokens = torch.randint(0, 97, (3, 11))
    torch.testing.assert_close(step(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    expected = [15] if onednn_is_faster() else [0]
    assert [len(graph.linear_layers) for graph in log.graphs] == expected
    report = apack_compile.report(log)
    assert ("linear: oneDNN for 15 layers" in str(report)) == ("linear" in report.operations) == onednn_is_faster()


def test_the_report_of_an_optimized_model_counts_the_layers_of_a_step():
    model = apack_compile.optimize(llama(), preset="lossless", compile="eager", min_tokens=0)
    model.generate(torch.randint(10, 64, (1, 40)), max_new_tokens=4, do_sample=False)
    found = apack_compile.report(model).operations.get("linear", "")
    assert found.startswith("oneDNN for 15 layers") == onednn_is_faster()
