"""A prompt that is read once, and branches behind it."""

import copy

import pytest
import torch
from llava_and_draft import calibrated, llava, picture
from packed_pair import reachable, walked_bytes
from tiny_llama import gemma3, qwen3_next
from vlms import MODELS, PAD, build, prompt

import apack_compile
from apack_compile.generate.generation import CHUNKS_GO_ON
from apack_compile.plan.presets import AttentionPackOptions, SnapKVOptions

PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


def questions(lengths: tuple[int, ...], side: str = "left", seed: int = 3) -> dict[str, torch.Tensor]:
    """Random questions of so many tokens, padded on one side."""
    generator, most = torch.Generator().manual_seed(seed), max(lengths)
    rows = [torch.randint(2, 80, (n,), generator=generator).tolist() for n in lengths]
    given = [(row, [1] * len(row), [0] * (most - len(row))) for row in rows]
    if side == "left":
        return {
            "input_ids": torch.tensor([[PAD] * len(pad) + row for row, _, pad in given]),
            "attention_mask": torch.tensor([pad + ones for _, ones, pad in given]),
        }
    return {
        "input_ids": torch.tensor([row + [PAD] * len(pad) for row, _, pad in given]),
        "attention_mask": torch.tensor([ones + pad for _, ones, pad in given]),
    }


def whole(inputs: dict, question: torch.Tensor) -> dict:
    """A prompt with a question `[1, T]` behind it."""
    more = {name: torch.zeros_like(question) for name in PER_TOKEN} | {"input_ids": question}
    more["attention_mask"] = torch.ones_like(question)
    return {name: torch.cat([x, more[name]], 1) if name in more else x for name, x in inputs.items()}


def answers(model, inputs: dict, asked: dict, tokens: int = 9, **options) -> list[list[int]]:
    """New tokens for each question, one prompt at a time."""
    found = []
    for ids, mask in zip(asked["input_ids"], asked["attention_mask"], strict=True):
        given = whole(inputs, ids[mask != 0][None])
        out = model.generate(**given, max_new_tokens=tokens, do_sample=False, **options)
        found += out[:, given["input_ids"].shape[1] :].tolist()
    return found


def new_of(out: torch.Tensor, tokens: int = 9) -> list[list[int]]:
    return out[:, -tokens:].tolist()


def contents(prefix) -> list[torch.Tensor]:
    return [x.clone() for x in reachable(prefix._cache, set()) if x.device.type != "meta"]


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_questions_over_a_lossless_prefix_get_the_dense_answers(name, side):
    model, placeholders = build(name)
    inputs = prompt(name, [[30, 20]], placeholders)
    asked = questions((5, 5, 5) if name == "gemma3" else (5, 1, 12), side)
    expected = answers(model, inputs, asked)
    calibrated(model, "eager", preset="lossless", strict=True)
    prefix = apack_compile.read(model, **inputs)
    assert prefix.length == inputs["input_ids"].shape[1] and copy.deepcopy(prefix) is prefix
    before = contents(prefix)
    for _ in range(2):
        out = prefix.generate(asked, max_new_tokens=9, do_sample=False)
        assert torch.equal(out[:, : prefix.length], inputs["input_ids"].expand(3, -1))
        assert new_of(out) == expected
    assert all(map(torch.equal, before, contents(prefix)))
    report = apack_compile.report(model)
    assert (report.graphs or name == "gemma3") and report.bytes["tokens"] == 3 * (out.shape[1] - 1)


@pytest.mark.parametrize("lengths", ((40,), (50, 33, 2)), ids=str)
def test_questions_longer_than_an_append_get_the_dense_answers(lengths):
    model, inputs, asked = llava(), picture(), questions(lengths)
    expected = answers(model, inputs, asked)
    calibrated(model, "eager", preset="lossless", strict=True)
    assert new_of(apack_compile.read(model, **inputs).generate(asked, max_new_tokens=9, do_sample=False)) == expected


def test_questions_with_pictures_of_their_own_get_the_dense_answers():
    model, inputs, asked = llava(), picture(), picture([7, 6], [4, 5], seed=9)
    given = {name: x for name, x in asked.items() if name != "pixel_values"}
    expected = []
    for row in range(2):
        one = {name: x[row : row + 1] for name, x in given.items()}
        pixels = torch.cat([inputs["pixel_values"], asked["pixel_values"][row : row + 1]])
        expected += answers(model, {**inputs, "pixel_values": pixels}, one)
    calibrated(model, "none", preset="lossless", strict=True)
    prefix = apack_compile.read(model, **inputs)
    out = prefix.generate(asked, max_new_tokens=9, do_sample=False)
    assert new_of(out) == expected
    assert prefix.branch(2).report()["tokens"] == 2 * prefix.length


def test_beams_and_several_sequences_over_a_lossless_prefix():
    model, inputs, asked = llava(), picture(), questions((5, 12))
    expected = answers(model, inputs, asked, num_beams=3)
    calibrated(model, "none", preset="lossless", strict=True)
    prefix = apack_compile.read(model, **inputs)
    assert new_of(prefix.generate(asked, max_new_tokens=9, num_beams=3, do_sample=False)) == expected
    out = prefix.generate(asked, max_new_tokens=9, do_sample=True, num_return_sequences=3)
    assert len(out) == 6


def test_sampling_over_a_lossless_prefix_draws_the_dense_tokens():
    model, inputs, asked = llava(), picture(), questions((5, 5, 5))
    ids = torch.cat([inputs["input_ids"].expand(3, -1), asked["input_ids"]], 1)
    pictures = inputs["pixel_values"].repeat(3, 1, 1, 1)
    torch.manual_seed(0)
    dense = model.generate(
        ids, attention_mask=torch.ones_like(ids), pixel_values=pictures, do_sample=True, max_new_tokens=9
    )
    calibrated(model, "none", preset="lossless", strict=True)
    prefix = apack_compile.read(model, **inputs)
    torch.manual_seed(0)
    assert torch.equal(prefix.generate(asked["input_ids"], do_sample=True, max_new_tokens=9), dense)


def test_several_turns_in_each_branch():
    model, inputs, first, second = llava(), picture(), questions((5, 12)), questions((7, 7), seed=8)
    dense = copy.deepcopy(model)
    calibrated(model, "eager", preset="lossless", strict=True)
    prefix = apack_compile.read(model, **inputs)
    out = prefix.generate(first, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    said = torch.cat([out.sequences, second["input_ids"]], 1)
    mask = torch.ones_like(said)
    mask[0, prefix.length : prefix.length + 7] = 0
    again = model.generate(
        said, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=9, do_sample=False
    )
    for row, keep, got in zip(said, mask, new_of(again), strict=True):
        given = row[keep != 0][None]
        expected = dense.generate(
            given,
            attention_mask=torch.ones_like(given),
            pixel_values=inputs["pixel_values"],
            max_new_tokens=9,
            do_sample=False,
        )
        assert got == new_of(expected)[0]


@pytest.mark.parametrize(
    ("made", "message"), ((gemma3, "windows of layers 0"), (qwen3_next, "linear states of layers 0, 2"))
)
def test_questions_of_several_lengths_are_refused_where_padding_would_be_seen(made, message):
    model = calibrated(made(), preset="lossless")
    ids = torch.randint(4, 40, (1, 60), generator=torch.Generator().manual_seed(1))
    prefix = apack_compile.read(model, input_ids=ids)
    with pytest.raises(ValueError, match=f"questions: their lengths differ .2, 5., and padding would .* {message}"):
        prefix.generate(questions((5, 2, 5)))
    for length in (5, 2):
        asked = torch.randint(4, 40, (3, length), generator=torch.Generator().manual_seed(2))
        out = prefix.generate(asked, max_new_tokens=9, do_sample=False)
        whole = torch.cat([ids.expand(3, -1), asked], 1)
        assert torch.equal(
            out, apack_compile.restore(copy.deepcopy(model)).generate(whole, max_new_tokens=9, do_sample=False)
        )


def test_whole_prompts_over_a_branch():
    model, inputs, asked = llava(), picture(), questions((5,))
    expected = answers(model, inputs, asked)
    calibrated(model, "none", preset="lossless", strict=True)
    prefix = apack_compile.read(model, **inputs)
    given = whole(inputs, asked["input_ids"])
    given.pop("pixel_values")
    out = model.generate(**given, past_key_values=prefix.branch(), max_new_tokens=9, do_sample=False)
    assert new_of(out) == expected


def model_and_prompt(compile: str, coarse: bool) -> tuple:
    """A model with relative keys, and a prompt whose packed text ends where a block of slots does, so that all anchors are alike."""
    model = calibrated(llava(), compile, ratio=5.2 if coarse else 4)
    if coarse:
        plan = apack_compile.plan_for(model, 1_000, 4 / 250)
        assert plan.coarse is not None
        apack_compile.optimize(model, plan=plan, compile=compile)
    return model, next(inputs for n in range(90, 0, -1) if is_aligned(model, inputs := picture([330, n])))


def is_aligned(model, inputs: dict) -> bool:
    layer = packed(model, inputs).packed_layers[0]
    return (layer.packed - layer.origin) % layer.index.plan.rotation.block == 0


def packed(model, inputs: dict):
    """A cache of its own for a prompt."""
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


@pytest.mark.parametrize("compile", ("none", "eager"))
@pytest.mark.parametrize("coarse", (False, True))
def test_packed_branches_say_what_copies_of_the_packed_cache_say(coarse, compile):
    model, inputs = model_and_prompt(compile, coarse)
    asked = questions((9, 4, 9))
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    prefix = apack_compile.read(model, **inputs)
    shared = prefix.generate(asked, **options)
    copied = packed(model, inputs)
    copied.batch_repeat_interleave(3)
    separate = model.generate(**prefix._with_questions(asked), past_key_values=copied, **options)
    assert torch.equal(shared.sequences, separate.sequences)
    logits, wanted = torch.stack(shared.logits), torch.stack(separate.logits)
    torch.testing.assert_close(logits, wanted, atol=2e-2, rtol=1e-2)
    assert (logits - wanted).square().mean().sqrt() <= 1e-2


def test_bytes_are_the_prefix_once_and_what_each_row_has():
    model = calibrated(llava(), ratio=4)
    prefix = apack_compile.read(model, **picture([300, 200]))
    sizes = []
    for rows in (1, 2, 16):
        report = prefix.branch(rows).report()
        sizes.append(report["sequence_bytes"])
        assert report["parts"]["the prefix of all rows"] > 0
        assert report["sequence_bytes"] + report["model_bytes"] == walked_bytes(prefix.branch(rows))
    own = sizes[1] - sizes[0]
    assert sizes[2] - sizes[0] == 15 * own
    assert prefix.nbytes + own > sizes[0] > prefix.nbytes > own


def test_one_graph_for_any_number_of_branches_and_any_prefix():
    model = calibrated(llava(), "eager", preset="lossless", strict=True)
    for length, rows in ((150, 2), (190, 3), (170, 5), (130, 4)):
        prefix = apack_compile.read(model, **picture([length, 20]))
        prefix.generate(questions((5,) * rows), max_new_tokens=4, do_sample=False)
        if rows == 3:
            graphs = len(apack_compile.report(model).graphs)
    assert len(apack_compile.report(model).graphs) == graphs


def test_a_branch_knows_its_model_s_positions_after_other_prompts():
    model, placeholders = build("qwen2_5_vl")
    inputs, other = (
        prompt("qwen2_5_vl", [[30, 20]], placeholders),
        prompt("qwen2_5_vl", [[9, 3, 4, 5]], placeholders, seed=4),
    )
    asked = questions((5, 3))
    expected = answers(model, inputs, asked)
    calibrated(model, "none", preset="lossless", strict=True)
    prefix = apack_compile.read(model, **inputs)
    apack_compile.read(model, **other)
    assert new_of(prefix.generate(asked, max_new_tokens=9, do_sample=False)) == expected
    with pytest.raises(ValueError, match="questions: pictures in them are positioned by those before them"):
        prefix.generate(torch.tensor([[5, model.config.image_token_id]]))


def test_text_alone_is_not_positioned_by_earlier_pictures():
    model, placeholders = build("qwen2_5_vl")
    inputs, asked = prompt("qwen2_5_vl", [[40]], placeholders), questions((5, 3))
    inputs.pop("mm_token_type_ids", None)
    expected = [
        model.generate(whole(inputs, ids[mask != 0][None])["input_ids"], max_new_tokens=9, do_sample=False)[
            0, -9:
        ].tolist()
        for ids, mask in zip(asked["input_ids"], asked["attention_mask"], strict=True)
    ]
    calibrated(model, "none", preset="lossless", strict=True)
    apack_compile.read(model, **prompt("qwen2_5_vl", [[9, 3, 4, 5]], placeholders, seed=4))
    prefix = apack_compile.read(model, **inputs)
    assert new_of(prefix.generate(asked, max_new_tokens=9, do_sample=False)) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    (
        ({"preset": "attentionpack"}, "preset='attentionpack' ranks and drops a row's tokens"),
        ({"preset": "snapkv", "options": SnapKVOptions()}, "preset='snapkv' ranks and drops a row's tokens"),
        ({"preset": "a-vl"}, "preset='a-vl' ranks and drops a row's tokens"),
        (
            {"preset": "attentionpack", "options": AttentionPackOptions(1.0, 1.0)},
            r"bases are fitted to the tokens of each row \(preset='attentionpack'\)",
        ),
    ),
    ids=str,
)
def test_presets_that_treat_each_row_by_its_own_tokens_are_refused(setting, message):
    model = llava()
    apack_compile.optimize(model, apack_compile.AttentionPackConfig(**setting, compile="none"))
    with pytest.raises(ValueError, match=f"read: {message}"):
        apack_compile.read(model, **picture())


def test_chunks_behind_a_filled_cache_are_refused_where_transformers_reads_it_again():
    model = calibrated(llava(), preset="lossless")
    prefix = apack_compile.read(model, **picture())
    given, options = questions((50,)), {"max_new_tokens": 3, "prefill_chunk_size": 8, "do_sample": False}
    if CHUNKS_GO_ON:
        assert torch.equal(prefix.generate(given, **options), prefix.generate(given, max_new_tokens=3, do_sample=False))
        return
    with pytest.raises(
        ValueError, match=r"prefill_chunk_size: the cache holds 56 tokens, which transformers .* would read again"
    ):
        prefix.generate(given, **options)


def test_what_is_not_one_prompt_is_refused():
    model = calibrated(llava(), preset="lossless")
    inputs = picture()
    two = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in inputs.items()}
    padded = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    padded["attention_mask"][0, :2] = 0
    for given, message in (
        (two, "input_ids: .2, 56. must be token ids of one prompt"),
        (padded, "attention_mask: hides 2 tokens; a prefix has no padding"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "inputs_embeds: read takes input_ids"),
        ({**inputs, "past_key_values": apack_compile.new_cache(model)}, "past_key_values: read takes input_ids"),
        ({}, "input_ids: NoneType must be token ids of one prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            apack_compile.read(model, **given)
    with pytest.raises(ValueError, match="is not optimized"):
        apack_compile.read(llava(), **inputs)


def test_a_prompt_that_peft_puts_in_front_is_refused():
    peft = pytest.importorskip("peft")
    model = calibrated(gemma3(), preset="lossless")
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="read: PEFT's PromptTuningConfig puts tokens of its own before every prompt"):
        apack_compile.read(tuned, input_ids=torch.tensor([[5, 6, 7]]))


def test_questions_that_cannot_be_read_are_refused():
    model = calibrated(llava(), preset="lossless")
    prefix = apack_compile.read(model, **picture())
    ids = torch.tensor([[5, 6, 7]])
    for given, options, message in (
        ([[5, 6]], {}, "questions: input_ids must be a tensor of token ids"),
        (
            {"input_ids": ids, "attention_mask": torch.ones(1, 2)},
            {},
            "attention_mask .1, 2. must have the shape of input_ids",
        ),
        ({"input_ids": ids, "attention_mask": torch.zeros(1, 3)}, {}, "questions: each must have at least one token"),
        (ids[:, :0], {}, "questions: each must have at least one token"),
        (ids, {"past_key_values": prefix.branch()}, "past_key_values: is the prefix's own to give"),
        (ids, {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: the cache holds"),
    ):
        with pytest.raises(ValueError, match=message):
            prefix.generate(given, **options)
    for bad in ({"n": 0}, {"n": True}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match="must be an integer >="):
            prefix.branch(**bad)
