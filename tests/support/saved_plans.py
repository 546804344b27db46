"""Models, plans and files of plans, and when two plans are equal."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from apack_compile import Plan
from apack_compile.plan.file import PLAN, digest
from apack_compile.plan.plan import Provenance

IMAGE = 9
RATIO = 3
HEADS, HEAD_DIM, LAYERS = 2, 16, 2
SIGNATURE = (LAYERS, HEADS, HEAD_DIM, "torch.float32")


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": HEADS * HEAD_DIM * 2,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2 * HEADS,
        "num_key_value_heads": HEADS,
    }
    config = LlamaConfig(**{**sizes, **changes})
    config.image_token_id = IMAGE
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(seed: int, vision: int = 90) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 64, (1, 240), generator=torch.Generator().manual_seed(seed))
    ids[0, 20 : 20 + vision] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assert_equal(found: Plan, expected: Plan) -> None:
    others = {"bases": {}, "provenance": Provenance(), "rotation": None, "coarse": None, "windows": {}}
    assert list(found.windows) == list(expected.windows)
    assert replace(found, **others) == replace(expected, **others)
    assert (found.coarse is None) == (expected.coarse is None)
    if expected.coarse is not None:
        assert (found.coarse.modality, found.coarse.share) == (expected.coarse.modality, expected.coarse.share)
        assert set(found.coarse.weights) == set(expected.coarse.weights)
        assert all(torch.equal(w, expected.coarse.weights[i]) for i, w in found.coarse.weights.items())
    assert (found.rotation is None) == (expected.rotation is None)
    if expected.rotation is not None:
        assert (found.rotation.block, found.rotation.interleaved) == (
            expected.rotation.block,
            expected.rotation.interleaved,
        )
        assert torch.equal(found.rotation.frequencies, expected.rotation.frequencies)
        assert (found.rotation.coordinates is None) == (expected.rotation.coordinates is None)
    for window, part in expected.windows.items():
        assert_equal(found.windows[window], part)
    assert found.provenance.calibrated_on == expected.provenance.calibrated_on
    assert set(found.bases) == set(expected.bases)
    for layer, bases in expected.bases.items():
        for one, other in zip(found.bases[layer], bases, strict=True):
            for tensor, wanted in zip(one, other, strict=True):
                assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a basis owns no more than it needs"


def write(path: Path, values: dict, tensors: dict[str, torch.Tensor], version: str = PLAN.version) -> None:
    """A file whose checksum is right, whatever it says."""
    text = json.dumps(values)
    save_file(tensors, path, {"apack_plan": version, "plan": text, "sha256": digest(text, tensors)})


def decoded(model: LlamaForCausalLM, tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, and the logits they were chosen by."""
    out = model.generate(
        **prompt(7), max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits)


WINDOW = 20
WINDOWED = {
    "one full": lambda sizes: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=MIXED)),
    "all sliding": lambda sizes: MistralForCausalLM(MistralConfig(**sizes)),
    # sliding layers have another head_dim, and other frequencies
    "wide sliding": lambda sizes: Gemma4ForCausalLM(
        Gemma4TextConfig(
            **{**sizes, "head_dim": 24}, global_head_dim=16, layer_types=MIXED, num_kv_shared_layers=0, **PER_LAYER
        )
    ),
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 64}


def windowed(kind: str, **changes) -> PreTrainedModel:
    """A model whose layers have windows of 20 tokens, all or all but one."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        # so that sampled tokens differ where logits do
        "initializer_range": 0.2,
    }
    model = WINDOWED[kind]({**sizes, **changes}).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def sampled(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled tokens, past the end of a window, and the logits they were chosen by."""
    torch.manual_seed(0)
    ids = torch.randint(2, 64, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(1))
    out = model.generate(ids, max_new_tokens=2 * WINDOW, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)
