"""What `calibrate` is given: inputs of the model as any tool makes them; for anything else an error that says what is allowed."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, BatchFeature, LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile.calibration.inputs import checked_inputs
from apack_compile.checks import counted

VOCABULARY, IMAGE = 96, 200
IDS = torch.randint(3, 90, (2, 120), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return apack_compile.optimize(LlamaForCausalLM(config).eval(), ratio=4, compile="none", min_tokens=0)


def embeddings() -> torch.Tensor:
    return torch.randn(2, 120, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": IDS},
        {"input_ids": IDS.int(), "attention_mask": torch.ones_like(IDS), "labels": IDS},
        {"input_ids": None, "inputs_embeds": embeddings()},
        BatchEncoding({"input_ids": IDS}),
        BatchFeature({"input_ids": IDS}),
        [{"input_ids": IDS[:1]}, BatchEncoding({"input_ids": IDS[1:]})],
        ({"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}),
        torch.utils.data.DataLoader([{"input_ids": row} for row in IDS], batch_size=1),
    ],
    ids=lambda inputs: type(inputs).__name__,
)
def test_inputs_of_the_model_calibrate(model, inputs):
    apack_compile.calibrate(model, inputs)
    assert apack_compile.plan_for(model, 120).bases


def test_a_generator_of_inputs_calibrates_as_their_list(model):
    batches = [{"input_ids": row[None]} for row in IDS]
    apack_compile.calibrate(model, batches)
    expected = apack_compile.plan_for(model, 120).bases[0][2].mean
    apack_compile.calibrate(model, {"input_ids": IDS[:1]})
    assert not torch.equal(apack_compile.plan_for(model, 120).bases[0][2].mean, expected)
    apack_compile.calibrate(model, (batch for batch in batches))
    assert torch.equal(apack_compile.plan_for(model, 120).bases[0][2].mean, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (IDS, r"a Tensor \[2, 120\] must be a dictionary of the model's inputs as torch tensors"),
        (IDS.numpy(), r"an ndarray \[2, 120\] must be a dictionary"),
        ("some text", "a str must be a dictionary"),
        (b"some text", "a bytes must be a dictionary"),
        (None, "a NoneType must be a dictionary"),
        (7, "an int must be a dictionary"),
        ([IDS], r"number 0, a Tensor \[2, 120\], must be a dictionary"),
        (["one", "two"], "number 0, a str, must be a dictionary"),
        ([{"input_ids": IDS}, (IDS,)], "number 1, a tuple, must be a dictionary"),
        ((batch for batch in ([IDS],)), "number 0, a list, must be a dictionary"),
        ([], "an empty list; pass a dictionary"),
        ({}, r"a dictionary with nothing in it, must have input_ids \[B, T\] or inputs_embeds"),
        ({"text": "one"}, r"a dictionary with \['text'\], must have input_ids"),
        ({"input_ids": None}, r"a dictionary with \['input_ids'\], must have"),
        ({"input_ids": IDS[0]}, r"input_ids has the shape \[120\], must be \[B, T\]"),
        ({"input_ids": IDS[None]}, r"input_ids has the shape \[1, 2, 120\], must be \[B, T\]"),
        ({"input_ids": IDS[:, :0]}, r"input_ids has the shape \[2, 0\], must hold at least one token"),
        ({"inputs_embeds": embeddings()[0]}, r"inputs_embeds has the shape \[120, 64\], must be \[B, T, hidden\]"),
        ({"input_ids": IDS.numpy()}, r"input_ids is an ndarray \[2, 120\], must be a torch\.Tensor"),
        ({"input_ids": IDS.tolist()}, r"input_ids is a list, must be a torch\.Tensor \[B, T\]; .*return_tensors='pt'"),
        (BatchEncoding({"input_ids": IDS.tolist()}), "input_ids is a list"),
        ({"input_ids": IDS, "attention_mask": np.ones((2, 120))}, "attention_mask is an ndarray"),
        ({"input_ids": IDS, "attention_mask": [[1] * 120] * 2}, r"attention_mask is a list, must be .* \[2, 120\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 119)}, r"attention_mask has the shape \[2, 119\], must be"),
        ({"input_ids": IDS.float()}, r"input_ids has the dtype torch\.float32, must be an integer type"),
        ({"input_ids": IDS + VOCABULARY}, rf"input_ids has ids from \d+ to \d+, must be from 0 to {VOCABULARY - 1}"),
        ({"input_ids": IDS - 90}, rf"input_ids has ids from -\d+ to -?\d+, must be from 0 to {VOCABULARY - 1}"),
        ({"input_ids": IDS.to("meta")}, "input_ids is on the device meta, must be on the model's, cpu"),
        ([{"input_ids": IDS}, {"input_ids": IDS[0]}], r"number 1, input_ids has the shape \[120\]"),
    ],
)
def test_what_a_model_cannot_read_is_named_with_what_is_allowed(model, inputs, message):
    with pytest.raises(ValueError, match=f"^inputs: {message}"):
        apack_compile.calibrate(model, inputs)


def test_inputs_on_another_device_than_the_model_are_named(model, monkeypatch):
    monkeypatch.setattr(type(model), "device", torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"^inputs: input_ids is on the device cpu, must be on the model's, cuda:0"):
        apack_compile.calibrate(model, {"input_ids": IDS})


def test_the_id_of_a_picture_needs_no_embedding(model, monkeypatch):
    ids = IDS.clone()
    ids[:, 5:20] = IMAGE
    with pytest.raises(ValueError, match=r"^inputs: input_ids has ids from 3 to 200"):
        apack_compile.calibrate(model, {"input_ids": ids})
    monkeypatch.setattr(model.config, "image_token_id", IMAGE, raising=False)
    assert checked_inputs(model, {"input_ids": ids}) == [{"input_ids": ids}]


class Narrow(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids, attention_mask)


def test_an_argument_that_the_model_does_not_take_is_named(model):
    with pytest.raises(ValueError, match=r"^inputs: pixels: Narrow\.forward has no such argument"):
        checked_inputs(Narrow(model.config), {"input_ids": IDS, "pixels": IDS})


def test_one_input_is_not_called_inputs(model):
    short = {"input_ids": torch.tensor([[3, 4]])}
    for inputs, said in ((short, "1 calibration input"), ([short] * 2, "2 calibration inputs")):
        with pytest.raises(ValueError, match=rf"inputs: no usable token in {said} \("):
            apack_compile.calibrate(model, inputs)
    assert [counted(number, "layer") for number in (0, 1, 2, 1_024)] == [
        "0 layers",
        "1 layer",
        "2 layers",
        "1,024 layers",
    ]
