"""Models that accelerate offloads: they generate packed, and calibrate with gradients where those fit."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile.calibration import sensitivity
from apack_compile.models.offload import computing_device, is_offloaded

accelerate = pytest.importorskip("accelerate", reason="accelerate is an extra")

IDS = torch.randint(3, 90, (1, 300), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


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


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU)


def to_disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device=CPU)


def in_part(model, folder):
    places = {"model.layers.1": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.fixture(params=[to_cpu, to_disk, in_part])
def offload(request, tmp_path):
    return partial(request.param, folder=tmp_path)


def greedy(model, tokens: int = 12) -> torch.Tensor:
    return model.generate(input_ids=IDS, max_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("compile", ["none", "eager"])
def test_an_offloaded_model_gives_the_tokens_of_its_dense_cache(offload, compile):
    model = llama()
    dense = greedy(model)
    offload(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    apack_compile.optimize(model, preset="lossless", compile=compile)
    assert torch.equal(greedy(model), dense)
    report = apack_compile.report(model)
    assert report.bytes["tokens"] == IDS.shape[1] + 11 and report.compile == "none"
    if compile == "eager":
        assert report.compile_reason.startswith("no step is compiled of a model that accelerate offloads")


@pytest.mark.parametrize("calibrates", (True, False), ids=("calibrate", "first request"))
def test_an_offloaded_model_calibrates_and_decodes_as_before(offload, calibrates):
    model = apack_compile.optimize(llama(), ratio=4, compile="none", min_tokens=0)
    offloaded = offload(llama())
    apack_compile.optimize(offloaded, ratio=4, compile="none", min_tokens=0)
    for one in (model, offloaded) if calibrates else ():
        apack_compile.calibrate(one, {"input_ids": IDS})
    expected = greedy(model)
    bases = apack_compile.plan_for(model, 300).bases
    assert torch.equal(greedy(offloaded), expected)
    for layer, streams in apack_compile.plan_for(offloaded, 300).bases.items():
        for found, wanted in zip(streams, bases[layer], strict=True):
            torch.testing.assert_close(found.decoder, wanted.decoder)
    assert not apack_compile.report(offloaded).notes
    # what was optimized before it was offloaded goes on as well
    offload(model)
    assert torch.equal(greedy(model), expected)


def test_a_model_that_accelerate_places_by_max_memory_calibrates_and_decodes_as_before(tmp_path):
    model = apack_compile.optimize(llama(), ratio=4, compile="none", min_tokens=0)
    model.save_pretrained(tmp_path / "model")
    placed = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 200_000}, offload_folder=str(tmp_path / "weights")
    ).eval()
    assert {"cpu", "disk"} == set(placed.hf_device_map.values()) and is_offloaded(placed)
    apack_compile.optimize(placed, ratio=4, compile="none", min_tokens=0)
    for one in (model, placed):
        apack_compile.calibrate(one, {"input_ids": IDS})
    assert torch.equal(greedy(placed), greedy(model))
    assert apack_compile.report(placed).bytes == apack_compile.report(model).bytes


def test_layers_that_compute_on_several_devices_are_refused():
    model = llama()
    optimized = apack_compile.optimize(llama(), ratio=4, compile="none", min_tokens=0)
    for one in (model, optimized):
        for i, layer in enumerate(one.model.layers):
            hook = accelerate.hooks.AlignDevicesHook(execution_device=f"cuda:{i}")
            accelerate.hooks.add_hook_to_module(layer, hook)
    message = r"^model: its layers compute on cuda:0, cuda:1 \(device_map\), .*tensor parallelism"
    with pytest.raises(ValueError, match=message):
        apack_compile.optimize(model, ratio=4)
    assert "generate" not in vars(model)
    with pytest.raises(ValueError, match=message):
        greedy(optimized)


def test_gradients_that_do_not_fit_are_left_out(monkeypatch):
    def fill_the_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sensitivity, "drawn_score", fill_the_memory)
    model = apack_compile.optimize(llama(), ratio=4, compile="none", min_tokens=0)
    apack_compile.calibrate(model, {"input_ids": IDS})
    assert any("do not fit into the device's memory" in note for note in apack_compile.report(model).notes)


def test_where_a_model_computes_is_said_by_accelerate():
    model = llama()
    assert computing_device(model) == CPU and not is_offloaded(model)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert model.device.type == "meta" and computing_device(model) == CPU and is_offloaded(model)
    on_accelerator = accelerate.hooks.AlignDevicesHook(execution_device="cuda:1")
    accelerate.hooks.add_hook_to_module(model.model.layers[1], on_accelerator, append=True)
    assert computing_device(model) == torch.device("cuda:1")


def test_what_an_offloaded_model_cannot_have_is_said():
    pytest.importorskip("torchao", reason="torchao is an extra")
    model = accelerate.cpu_offload(llama(), execution_device=CPU)
    with pytest.raises(ValueError, match=r"quantize='int8wo': weights are offloaded by accelerate; quantize .* before"):
        apack_compile.optimize(model, ratio=4, quantize="int8wo", min_tokens=0)
    with pytest.raises(ValueError, match=r"^model: weights are on the meta device; load them first"):
        apack_compile.optimize(llama().to("meta"), min_tokens=0)
