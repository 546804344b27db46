"""A LLaVA with random weights and its processor, as a user has them in a folder."""

from pathlib import Path

import torch

SIDE, PATCH, WORDS = 64, 4, 96


def save_small_vlm(folder: Path) -> None:
    """Write a model of 2 layers and its processor, whose pictures are 256 tokens each."""
    model, processor = small_vlm()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def small_vlm() -> tuple[torch.nn.Module, object]:
    """A LLaVA of 2 layers with random weights, and its processor."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<image>", *map(str, range(WORDS - 4))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<image>|\w+|[^\w\s]"), "isolated")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="</s>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    text = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=vocabulary["<image>"])
    return LlavaForConditionalGeneration(config).eval(), processor
