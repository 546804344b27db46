"""Many requests in as few batches as a byte budget allows. Runs offline: `make install` first."""

import torch

import apack_compile
from apack_compile.demo.assets import load_model, load_questions, load_tokenizer
from apack_compile.demo.evaluate import calibration_inputs
from apack_compile.demo.prompts import ASSISTANT, load_pixels, pictures_text, question_text

IMAGES, REQUESTS, BUDGET = 4, 24, 50_000_000

model, tokenizer = load_model(), load_tokenizer()
apack_compile.optimize(model, ratio=4)
training = load_questions("train", seed=0)
apack_compile.calibrate(model, calibration_inputs(tokenizer, training, IMAGES), tokens=2_000)

pictures = [about[0] for about in load_questions("test", seed=0)]
requests = [pictures[i : i + IMAGES] for i in range(0, REQUESTS * IMAGES, IMAGES)]
texts = [pictures_text(IMAGES) + question_text(group[0].text, 0, IMAGES) + ASSISTANT for group in requests]
inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
tokens = inputs.input_ids.shape[1]

vision = float((inputs.input_ids == model.config.image_token_id).float().mean())
batch = apack_compile.largest_batch(model, tokens, BUDGET, vision)
print(f"{batch} requests of {tokens} tokens fit in {BUDGET:,} bytes")

right = 0
for start in range(0, REQUESTS, batch):
    part = slice(start, start + batch)
    with torch.no_grad():
        answers = model.generate(
            input_ids=inputs.input_ids[part],
            attention_mask=inputs.attention_mask[part],
            pixel_values=load_pixels([picture for group in requests[part] for picture in group]),
            max_new_tokens=6,
            do_sample=False,
        )
    said = tokenizer.batch_decode(answers[:, tokens:], skip_special_tokens=True)
    right += sum(text.strip().startswith(group[0].answer) for text, group in zip(said, requests[part], strict=True))
    print(apack_compile.report(model).bytes["sequence_bytes"], "bytes in the last batch's cache")
print(f"{right} of {REQUESTS} answers are right")
