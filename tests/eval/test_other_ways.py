"""Ways to evaluate an optimized model other than lm-eval's: what is read from packed keys, and what is not."""

import string
from pathlib import Path

import pytest
import torch
from tiny_llama import llama, text, tokenizer, tokens
from transformers import Trainer, TrainingArguments, pipeline

import apack_compile


@pytest.fixture
def packed():
    model = apack_compile.optimize(llama(), ratio=3, compile="none", min_tokens=0)
    model.generation_config.eos_token_id = None
    return apack_compile.calibrate(model, {"input_ids": torch.tensor([tokens(300, 20)])})


@pytest.mark.parametrize("batch_size", (1, 2))
def test_a_text_generation_pipeline_generates_packed(packed, batch_size):
    side = tokenizer()
    side.padding_side = "left"
    pipe = pipeline("text-generation", model=packed, tokenizer=side, batch_size=batch_size)
    assert pipe.model is packed
    prompts = [text(200, 1), text(150, 2)][:batch_size]
    pipe(prompts, max_new_tokens=12, max_length=None, do_sample=False)
    report = apack_compile.report(packed)
    assert report.bytes["tokens"] == batch_size * (200 + 12 - 1)
    assert report.bytes["ratio"] > 2


def test_an_image_text_to_text_pipeline_generates_packed():
    pytest.importorskip("PIL")
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast
    from vlms import IMAGE, build

    characters = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits, " "]
    vocabulary = {token: i for i, token in enumerate(characters)} | {"<image>": IMAGE}
    vocabulary |= {f"<{i}>": i for i in range(96) if i not in vocabulary.values()}
    splits = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splits.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=splits,
            pad_token="<pad>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
            padding_side="left",
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    model, placeholders = build("llava")
    apack_compile.optimize(model, ratio=3, compile="none", min_tokens=0)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    picture = Image.new("RGB", (16, 16), (200, 30, 60))
    question = text(60, 1).replace("\n", " ")
    pipe(images=[picture, picture], text=f"{question}<image><image>{question}", max_new_tokens=12, do_sample=False)
    report = apack_compile.report(model)
    assert report.bytes["tokens"] == 120 + 2 * placeholders + 12 - 1
    assert report.bytes["ratio"] > 2


def test_trainer_and_labels_measure_the_dense_model(packed, tmp_path: Path):
    data = [{"input_ids": list(tokens(120, i)), "labels": list(tokens(120, i))} for i in range(4)]
    options = TrainingArguments(output_dir=tmp_path, report_to=[], per_device_eval_batch_size=2, use_cpu=True)
    found = Trainer(model=packed, args=options, eval_dataset=data).evaluate()["eval_loss"]
    inputs = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        assert float(packed(input_ids=inputs, labels=inputs).loss) == pytest.approx(found, abs=1e-5)
        apack_compile.restore(packed)
        assert float(packed(input_ids=inputs, labels=inputs).loss) == pytest.approx(found, abs=1e-5)
