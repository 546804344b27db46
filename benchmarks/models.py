"""Models that `decode.py` runs: the four shapes with random weights, SmolLM2 and the demo's VLM with their own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from attend import SHAPES, default_groups, synthetic_plan
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import apack_compile
from apack_compile.config import AttentionPackConfig
from apack_compile.plan.plan import LayerPlan, Plan
from apack_compile.plan.presets.attentionpack import AttentionPackOptions
from apack_compile.plan.rotation import KeyRotation
from apack_compile.plan.signature import signature_of

# Width of the hidden states, of the feed-forward part, and layers of the shapes' models.
SIZES = {
    "Qwen2.5-VL-7B": (3584, 18_944, 28),
    "LLaVA-1.5-7B": (4096, 11_008, 32),
    "SmolLM2-135M": (576, 1_536, 30),
    "Gemma3-4B": (2560, 10_240, 34),
}
# Few, so that a shallow model's head does not weigh more than a deep one's.
RANDOM_VOCABULARY = 1_024
REAL = ("SmolLM2-135M, real", "demo VLM, real")
CALIBRATION_TOKENS = 2_048
CALIBRATION_PICTURES = 28
# A picture's tokens with the words in front of it.
TOKENS_A_PICTURE = 72
# Expected of random weights: a stream loses all of its variance.
LOSES_ALL = 1.0


@dataclass(frozen=True)
class Subject:
    """A model with a prompt.

    inputs: of its prefill. layers: of the model that its shape is of; the model itself may have fewer. prepare: makes the model
    use a packed cache.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    layers: int
    prepare: Callable[[], None]

    @property
    def built_layers(self) -> int:
        """Layers that the model has."""
        return self.model.config.get_text_config().num_hidden_layers


@dataclass(frozen=True)
class Packing:
    """What is asked of a packed cache: a ratio, or (None) the paper's plan without tiers; slots that share an anchor; head groups of random
    weights (None: as optimize chooses)."""

    ratio: float | None
    key_block: int
    groups: int | None = None

    @property
    def name(self) -> str:
        """What rows call it."""
        return "attentionpack, rank 64" if self.ratio is None else f"ratio={self.ratio:g}"

    @property
    def config(self) -> AttentionPackConfig:
        """As `optimize` takes it."""
        if self.ratio is None:
            options = AttentionPackOptions(full=1.0, partial=1.0)
            return AttentionPackConfig(preset="attentionpack", attentionpack=options, compile="none")
        return AttentionPackConfig(ratio=self.ratio, key_block=self.key_block, compile="none")


def random_subject(
    name: str, layers: int, tokens: int, batch: int, packing: Packing, dtype: torch.dtype, device: str
) -> Subject:
    """A Llama of a shape with random weights, fewer layers and a small vocabulary; a plan's bands are those of attend.py."""
    shape, (hidden, feed_forward, model_layers) = SHAPES[name], SIZES[name]
    config = LlamaConfig(
        vocab_size=RANDOM_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2**18,
        eos_token_id=None,
        dtype=dtype,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    ids = torch.randint(0, RANDOM_VOCABULARY, (batch, tokens), device=device)

    def prepare() -> None:
        if packing.ratio is None:
            apack_compile.optimize(model, packing.config)
        else:
            plan = random_plan(model, name, packing, tokens)
            apack_compile.optimize(model, plan=plan, compile="none")

    return Subject(name, model, {"input_ids": ids}, model_layers, prepare)


def random_plan(model: nn.Module, name: str, packing: Packing, tokens: int) -> Plan:
    """The plan of attend.py for a shape in every layer; whatever it loses is expected, so that no basis is fitted anew."""
    shape = SHAPES[name]
    chosen = default_groups(shape, packing.ratio, model.dtype, packing.key_block, model.device.type)
    plan = synthetic_plan(shape, packing.groups or chosen, packing.ratio, tokens, device=model.device.type)
    streams = LayerPlan(*(replace(stream, expected_error=LOSES_ALL) for stream in plan.layers[0].streams))
    layers = range(model.config.num_hidden_layers)
    rotation = None
    if packing.key_block:
        rotation = KeyRotation(model.model.rotary_emb.inv_freq.float().cpu().clone(), packing.key_block)
    return replace(
        plan,
        layers=dict.fromkeys(layers, streams),
        bases=dict.fromkeys(layers, plan.bases[0]),
        signature=signature_of(model),
        rotation=rotation,
    )


def real_subject(name: str, tokens: int, batch: int, packing: Packing, dtype: torch.dtype = torch.float32) -> Subject:
    """SmolLM2 on text, or the demo's VLM on test pictures, on the CPU; about `tokens` tokens a sequence."""
    from apack_compile.demo.assets import load_model, load_tokenizer

    model, tokenizer = load_model().to(dtype), load_tokenizer()
    inputs, calibration = (text_inputs if name == REAL[0] else picture_inputs)(tokenizer, tokens)
    inputs = {key: x.repeat(batch, *[1] * (x.dim() - 1)) for key, x in inputs.items()}
    for given in (inputs, calibration):
        given.update({key: x.to(dtype) for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()})

    def prepare() -> None:
        apack_compile.optimize(model, packing.config)
        if packing.ratio is not None:
            apack_compile.calibrate(model, calibration)

    return Subject(name, model, inputs, model.config.get_text_config().num_hidden_layers, prepare)


def text_inputs(tokenizer: Any, tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A prompt of text, and another to calibrate on."""
    from text_quality import CALIBRATION_PLACES, PLACES, text_ids

    ids, start = text_ids(tokenizer), CALIBRATION_PLACES[0]
    calibration = {"input_ids": ids[None, start : start + min(tokens, CALIBRATION_TOKENS)], "logits_to_keep": 1}
    return {"input_ids": ids[None, PLACES[0] : PLACES[0] + tokens]}, calibration


def picture_inputs(tokenizer: Any, tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A prompt of test pictures with a question, and a conversation about training pictures to calibrate on."""
    from apack_compile.demo.assets import load_questions
    from apack_compile.demo.evaluate import calibration_inputs
    from apack_compile.demo.prompts import build_prompt, load_pixels

    count = max(1, tokens // TOKENS_A_PICTURE)
    pictures = [group[0] for group in load_questions("test", seed=0)[:count]]
    ids = build_prompt(tokenizer, pictures[0].text, 0, count).input_ids
    training = load_questions("train", seed=0)
    calibration = calibration_inputs(tokenizer, training, min(count, CALIBRATION_PICTURES))[0]
    return {"input_ids": ids, "pixel_values": load_pixels(pictures)}, calibration
