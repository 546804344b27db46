"""largest_batch against the bytes of caches that were really filled."""

import pytest
import tiny_llama
import torch
import vlms

import apack_compile
from apack_compile import AttentionPackConfig, AttentionPackOptions

RANKS = dict.fromkeys(("vision_key", "vision_value", "text_key", "text_value"), 4)
ATTENTIONPACK = AttentionPackConfig(preset="attentionpack", ranks=RANKS, compile="none")
QUANTIZED = AttentionPackConfig(
    preset="attentionpack", ranks=RANKS, attentionpack=AttentionPackOptions(full=1.0, bits=4), compile="none"
)
# Model, setting, text tokens around the pictures of a prompt, rows that fit.
CASES = {
    "ratio": ("llama", {"ratio": 4}, [150], 3),
    "a short prompt": ("llama", {"ratio": 2}, [7], 2),
    "coarse tokens": ("wide llama", {"ratio": 6}, [1_100], 2),
    "windows": ("gemma3", {"ratio": 3}, [130, 3, 50], 3),
    "short windows": ("gemma3", {"ratio": 3}, [6, 5], 3),
    "pictures": ("llava", {"ratio": 3}, [5, *[2] * 20, 90], 4),
    "pictures alone": ("llava", {"ratio": 3}, [4, *[0] * 30], 3),
    "coordinates": ("qwen2_5_vl", {"ratio": 3}, [60, 4, 70], 3),
    "lossless": ("llava", {"preset": "lossless"}, [40, 3], 3),
    "tiers": ("llava", {"config": ATTENTIONPACK}, [60, *[1] * 15, 80], 3),
    "4 bits": ("llava", {"config": QUANTIZED}, [160, *[1] * 15, 40], 3),
    "bases that cost more than they save": ("llava", {"config": ATTENTIONPACK}, [60, 40], 3),
}


def model_of(name: str):
    if name == "wide llama":
        return tiny_llama.llama(2_048, head_dim=16)
    return tiny_llama.llama(2_048) if name == "llama" else vlms.build(name)[0]


def prompts(name: str, lengths: list[int], rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of one shape, with tokens of their own."""
    if "llama" in name:
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(4, 40, (rows, *lengths), generator=generator)}
    return vlms.prompt(name, [lengths] * rows, 4, seed)


@torch.no_grad()
def real_bytes(model, inputs: dict[str, torch.Tensor]) -> int:
    cache = apack_compile.new_cache(model)
    model(**inputs, past_key_values=cache)
    # a prompt that the shared bases do not fit gets bases of its own
    assert cache.notes == []
    held = cache.report()
    return held["sequence_bytes"] + held["model_bytes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_largest_batch_fits_and_one_more_does_not(case, dtype):
    name, setting, lengths, rows = CASES[case]
    model = model_of(name).to(dtype)
    apack_compile.optimize(model, **(setting if "config" in setting else {**setting, "compile": "none"}))
    if "ratio" in setting:
        apack_compile.calibrate(model, prompts(name, lengths, 8, seed=1))
    here = prompts(name, lengths, rows, seed=2)
    ids = here["input_ids"]
    share = float((ids == vlms.IMAGE).float().mean()) if "llama" not in name else 0.0
    fits, more = real_bytes(model, here), real_bytes(model, prompts(name, lengths, rows + 1, seed=2))
    found = [apack_compile.largest_batch(model, ids.shape[1], size, share) for size in (fits - 1, fits, more - 1, more)]
    assert found == [rows - 1, rows, rows, rows + 1]


def test_no_request_fits_where_the_bases_do_not():
    model = apack_compile.optimize(tiny_llama.llama(), ratio=4, compile="none")
    apack_compile.calibrate(model, prompts("llama", [300], 4, seed=1))
    assert apack_compile.largest_batch(model, 100, 0) == 0
    assert apack_compile.largest_batch(model, 100, 1_000) == 0


def test_counting_leaves_no_trace_in_the_report():
    model = apack_compile.optimize(tiny_llama.llama(), ratio=4, compile="none")
    apack_compile.calibrate(model, prompts("llama", [300], 4, seed=1))
    apack_compile.plan_for(model, 300)
    before = apack_compile.report(model).to_dict()
    assert apack_compile.largest_batch(model, 100, 10**6) > 0
    assert apack_compile.report(model).to_dict() == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0, 10), "tokens=0 must be an integer >= 1"),
        ((8.0, 10), "tokens=8.0 must be an integer >= 1"),
        ((8, -1), "budget_bytes=-1 must be an integer >= 0"),
        ((8, 2.5), "budget_bytes=2.5 must be an integer >= 0"),
        ((8, 10, 1.5), "vision_share=1.5 must be a number from 0 to 1"),
    ],
)
def test_bad_arguments_are_named(arguments, complaint):
    model = apack_compile.optimize(tiny_llama.llama(), preset="lossless", compile="none")
    with pytest.raises(ValueError, match=complaint):
        apack_compile.largest_batch(model, *arguments)


def test_a_ratio_without_calibration_says_so():
    model = apack_compile.optimize(tiny_llama.llama(), ratio=4, compile="none")
    with pytest.raises(RuntimeError, match=r"call apack_compile\.calibrate"):
        apack_compile.largest_batch(model, 100, 10**6)


@pytest.mark.parametrize(
    ("model", "setting", "complaint"),
    [
        (tiny_llama.llama, {"preset": "snapkv"}, "preset='snapkv' drops tokens"),
        (tiny_llama.lfm2, {"preset": "lossless"}, r"layer 0 \(conv\) is not packed"),
        (
            tiny_llama.llama,
            {"config": AttentionPackConfig(preset="attentionpack", attentionpack=AttentionPackOptions(basis="batch"))},
            "basis='batch' shares bases",
        ),
    ],
    ids=["drops tokens", "linear states", "bases of a batch"],
)
def test_what_cannot_be_counted_is_refused_with_the_reason(model, setting, complaint):
    optimized = apack_compile.optimize(model(), **setting)
    with pytest.raises(ValueError, match=complaint):
        apack_compile.largest_batch(optimized, 200, 10**6)


def test_a_model_that_is_not_optimized_is_refused():
    with pytest.raises(ValueError, match="not optimized"):
        apack_compile.largest_batch(tiny_llama.llama(), 100, 10**6)


def test_more_tokens_than_a_prompt_has_are_refused_at_once():
    model = apack_compile.optimize(tiny_llama.llama(), preset="lossless", compile="none")
    known = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"tokens=1000000000 must be at most 1048576; the model was made for {known}"):
        apack_compile.largest_batch(model, 10**9, 10**6)
    # a window's length does not end what a model takes
    assert apack_compile.largest_batch(model, known + 1, 10**9) > 0
    model.config.max_position_embeddings = 2**21
    with pytest.raises(ValueError, match="must be at most 2097152"):
        apack_compile.largest_batch(model, 10**9, 10**6)
