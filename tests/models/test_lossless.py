"""With the lossless preset, tokens equal the dense model's."""

import pytest
import torch
from vlms import MODELS, build, prompt

import apack_compile

NEW_TOKENS = 24
BATCHES = {"one-row": [[5, 9, 7]], "three-rows-padded": [[5, 9, 7], [30, 4], [3, 6, 8]]}


def generate(model, inputs, **kwargs):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, **{"do_sample": False, **kwargs})


@pytest.mark.parametrize("compile", ["none", "eager"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_a_vlm_generates_the_tokens_of_its_dense_cache(name, rows, compile):
    model, placeholders = build(name)
    inputs = prompt(name, rows, placeholders)
    dense = generate(model, inputs)
    assert dense[:, -NEW_TOKENS:].unique().numel() > 1
    apack_compile.optimize(model, preset="lossless", compile=compile, strict=True)
    packed = generate(model, inputs)
    assert torch.equal(packed, dense)
    status = [line.status for line in apack_compile.report(model).layers]
    assert status == ["rewritten" if compile == "eager" else "packed"] * 3


def test_vision_tokens_go_to_the_vision_segment_of_their_row():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[5, 9, 7], [30, 4], [3, 6, 8]], placeholders)
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    vision = cache.index.positions[1]
    for row in range(3):
        held = sorted(p for p in vision[row].tolist() if p >= 0)
        assert held == (inputs["input_ids"][row] == 90).nonzero()[:, 0].tolist()


GENERATION = {
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beams": {"num_beams": 3},
    "beams-several-sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sampling-several-sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("compile", ["none", "eager"])
@pytest.mark.parametrize("kwargs", GENERATION.values(), ids=GENERATION)
def test_every_way_to_generate_gives_the_dense_tokens(kwargs, compile):
    model, placeholders = build("llava")
    rows = [[5, 9, 7]] if "prompt_lookup_num_tokens" in kwargs else [[5, 9, 7], [30, 4]]
    inputs = prompt("llava", rows, placeholders)
    dense = generate(model, inputs, **kwargs)
    apack_compile.optimize(model, preset="lossless", compile=compile)
    assert torch.equal(generate(model, inputs, **kwargs), dense)


def test_assisted_decoding_gives_the_dense_tokens():
    model, placeholders = build("llava")
    assistant, _ = build("llava")
    inputs = prompt("llava", [[25]], placeholders)
    dense = generate(model, inputs)
    apack_compile.optimize(model, preset="lossless", compile="none")
    assert torch.equal(generate(model, inputs, assistant_model=assistant), dense)


def test_a_conversation_continues_over_a_passed_cache():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[5, 9]], placeholders)
    more = torch.randint(2, 80, (1, 40), generator=torch.Generator().manual_seed(3))
    apack_compile.optimize(model, preset="lossless", compile="eager")

    def talk(cache):
        first = generate(model, inputs, past_key_values=cache)
        ids = torch.cat([first, more], 1)
        follow_up = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        return generate(model, follow_up)

    from transformers import DynamicCache

    dense = talk(DynamicCache(config=model.config.get_text_config()))
    assert torch.equal(talk(apack_compile.new_cache(model, 100)), dense)


def test_a_prompt_prefilled_in_chunks_equals_the_dense_cache():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[90]], placeholders)
    dense = generate(model, inputs)
    apack_compile.optimize(model, preset="lossless", compile="none")
    for chunk in (1, 7, 33, 64):
        assert torch.equal(generate(model, inputs, prefill_chunk_size=chunk), dense)


def test_a_user_s_own_cache_wins():
    from transformers import DynamicCache

    model, placeholders = build("llava")
    inputs = prompt("llava", [[5, 9]], placeholders)
    apack_compile.optimize(model, ratio=4, compile="none", min_tokens=0)
    cache = DynamicCache(config=model.config.get_text_config())
    generate(model, inputs, past_key_values=cache)
    assert cache.get_seq_length() > 0
    assert apack_compile.report(model).bytes is None


def test_gradients_may_be_enabled_and_the_mode_of_the_model_stays():
    model, placeholders = build("llava")
    inputs = prompt("llava", [[5, 9]], placeholders)
    apack_compile.optimize(model, preset="lossless", compile="none")
    cache = apack_compile.new_cache(model)
    with torch.enable_grad():
        out = model(**inputs, past_key_values=cache)
    assert out.logits.requires_grad and not model.training
    assert not any(t.requires_grad for t in (*cache.layers[0].dense_tensors(), *cache.layers[0].packed_tensors()))


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_next_to_sliding_layers_a_step_attends_to_held_tokens_alone(rows):
    model, placeholders = build("gemma3")
    inputs = prompt("gemma3", rows, placeholders)
    inputs = {name: x for name, x in inputs.items() if name in ("input_ids", "attention_mask")}
    settings = {"output_scores": True, "return_dict_in_generate": True}
    dense = generate(model, inputs, **settings)
    apack_compile.optimize(model, preset="lossless", compile="none")
    packed = generate(model, inputs, **settings)
    torch.testing.assert_close(torch.stack(packed.scores), torch.stack(dense.scores))


def test_next_to_sliding_layers_a_picture_of_few_tokens_continues_a_conversation():
    model, placeholders = build("gemma3")
    first, second = (prompt("gemma3", [[5, 9]], placeholders, seed=seed) for seed in range(2))
    apack_compile.optimize(model, preset="lossless", compile="none")

    def logits(cache):
        with torch.no_grad():
            return [model(**inputs, past_key_values=cache).logits for inputs in (
                {name: x for name, x in first.items() if name != "attention_mask"},
                {name: x for name, x in second.items() if name != "attention_mask"},
            )]  # fmt: skip

    from transformers import DynamicCache

    dense = logits(DynamicCache(config=model.config.get_text_config()))
    torch.testing.assert_close(logits(apack_compile.new_cache(model)), dense)


@pytest.mark.parametrize("compile", ["none", "eager"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_quantized_weights_give_the_tokens_of_their_dense_cache(name, compile):
    pytest.importorskip("torchao", reason="torchao is an extra")
    model, placeholders = build(name)
    inputs = prompt(name, [[5, 9, 7]], placeholders)
    apack_compile.optimize(model, preset="lossless", quantize="int8wo", compile=compile)
    packed = generate(model, inputs)
    assert apack_compile.report(model).quantized_layers == 3 * 7
    assert torch.equal(packed, generate(apack_compile.restore(model), inputs))
