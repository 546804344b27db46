"""Many questions about one prompt of pictures, which is read once and kept in a file. Runs offline: `make install` first."""

import apack_compile
from apack_compile.demo.assets import load_model, load_questions, load_tokenizer
from apack_compile.demo.evaluate import calibration_inputs
from apack_compile.demo.prompts import ASSISTANT, load_pixels, pictures_text, question_text

IMAGES = 16

model, tokenizer = load_model(), load_tokenizer()
apack_compile.optimize(model, ratio=4)
apack_compile.calibrate(model, calibration_inputs(tokenizer, load_questions("train", seed=0), 4), tokens=2_000)

pictures = [about[0] for about in load_questions("test", seed=0)[:IMAGES]]
prompt = tokenizer(pictures_text(IMAGES), return_tensors="pt")
prefix = apack_compile.read(model, **prompt, pixel_values=load_pixels(pictures))
prefix.save("pictures.prefix")
print(f"{prefix.length} tokens in {prefix.nbytes:,} bytes")

prefix = apack_compile.load_prefix(model, "pictures.prefix")
texts = [question_text(about.text, i, IMAGES) + ASSISTANT for i, about in enumerate(pictures)]
questions = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
sequences = prefix.generate(questions, max_new_tokens=6, do_sample=False)

asked = prefix.length + questions.input_ids.shape[1]
answers = tokenizer.batch_decode(sequences[:, asked:], skip_special_tokens=True)
right = sum(said.strip().startswith(about.answer) for said, about in zip(answers, pictures, strict=True))
print(
    f"{right} of {IMAGES} answers are right; {prefix.branch(IMAGES).report()['sequence_bytes']:,} bytes for all of them"
)
