"""A small vision-language model answers a question about eight pictures from a packed cache. Runs offline: `make install` first."""

import apack_compile
from apack_compile.demo.assets import load_model, load_questions, load_tokenizer
from apack_compile.demo.prompts import build_prompt, load_pixels

model, tokenizer = load_model(), load_tokenizer()
pictures = [about[0] for about in load_questions("test", seed=0)[:8]]
prompt = build_prompt(tokenizer, pictures[0].text, image=0, images=len(pictures))

apack_compile.optimize(model, ratio=4)

ids = prompt.input_ids
tokens = model.generate(input_ids=ids, pixel_values=load_pixels(pictures), max_new_tokens=8, do_sample=False)
answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
print(f"{pictures[0].text} The model says: {answer!r}. Right is: {pictures[0].answer!r}.")

report = apack_compile.report(model)
print(report)
report.save("report.html")
print("wrote report.html")
