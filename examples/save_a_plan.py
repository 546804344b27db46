"""Calibrate once, save the plan, and use it with a model that was loaded anew. Runs offline: `make install` first."""

import apack_compile
from apack_compile.demo.assets import load_model, load_questions, load_tokenizer
from apack_compile.demo.evaluate import calibration_inputs
from apack_compile.demo.prompts import build_prompt, load_pixels

IMAGES = 8

model, tokenizer = load_model(), load_tokenizer()
apack_compile.optimize(model, ratio=4)
prompts = calibration_inputs(tokenizer, load_questions("train", seed=0), IMAGES)
apack_compile.calibrate(model, prompts, tokens=2_000)
apack_compile.plan_for(model, tokens=600, vision_share=0.9).save("plan.safetensors")

# in another process
plan = apack_compile.Plan.load("plan.safetensors")
model = apack_compile.optimize(load_model(), plan=plan)
pictures = [about[0] for about in load_questions("test", seed=0)[:IMAGES]]
ids = build_prompt(tokenizer, pictures[0].text, image=0, images=IMAGES).input_ids
tokens = model.generate(input_ids=ids, pixel_values=load_pixels(pictures), max_new_tokens=8, do_sample=False)
answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
print(f"{pictures[0].text} The model says: {answer!r}. Right is: {pictures[0].answer!r}.")
print(repr(apack_compile.report(model)))
