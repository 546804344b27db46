"""Every way to generate does what docs/guides/generate.md says."""

from pathlib import Path

import pytest
import torch
from generate_modes import DENSE, HUB, MODES, REFUSED, WORKS, table
from llava_and_draft import calibrated, greedy, llava, picture
from torch._dynamo.exc import BackendCompilerFailed
from transformers import CompileConfig, ContinuousBatchingManager, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

import apack_compile

TEXT = {"input_ids": torch.randint(2, 80, (1, 60), generator=torch.Generator().manual_seed(1))}
ELSEWHERE = {"attention weights", "several turns", "static prompt length", "no cache"}


def of(*results):
    return [pytest.param(m, id=m.name) for m in MODES if m.result in results and m.name not in ELSEWHERE]


def run(model, mode):
    arguments = {"max_new_tokens": 20, "do_sample": False, **mode.arguments(model)}
    torch.manual_seed(0)
    out = model.generate(**TEXT, **arguments)
    if "streamer" in arguments:
        return "".join(arguments["streamer"])
    return out


def tokens(out):
    return out if isinstance(out, (torch.Tensor, str)) else out.sequences


@pytest.mark.parametrize("mode", of(WORKS))
def test_a_mode_that_works_gives_the_dense_tokens_and_packs(mode):
    model = llava()
    dense = run(model, mode)
    calibrated(model, "eager", preset="lossless", strict=True)
    packed = run(model, mode)
    same = tokens(packed) == tokens(dense)
    assert same if isinstance(same, bool) else bool(same.all())
    report = apack_compile.report(model)
    assert bool(report.graphs) == mode.compiled
    assert ("guidance_scale" in str(report.notes)) == (mode.name == "guidance")
    if mode.name == "outputs":
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(packed[name]), torch.stack(dense[name]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed.hidden_states[5][-1], dense.hidden_states[5][-1], atol=1e-4, rtol=1e-4)
    calibrated(model, ratio=4)
    run(model, mode)
    held = apack_compile.report(model).bytes
    assert held["tokens"] >= 60 and held["sequence_bytes"] < held["dense_bytes"]


@pytest.mark.parametrize("mode", of(DENSE))
def test_a_mode_that_asks_for_another_cache_gets_it_and_the_report_says_so(mode):
    model = llava()
    dense = run(model, mode)
    calibrated(model, preset="lossless")
    assert torch.equal(run(model, mode), dense)
    report = apack_compile.report(model)
    assert report.bytes is None
    assert any(note.startswith("the last generate used no packed cache: ") for note in report.notes)


@pytest.mark.parametrize("mode", of(REFUSED))
def test_a_mode_that_cannot_be_packed_is_refused(mode):
    model = calibrated(llava(), preset="lossless")
    with pytest.raises(ValueError, match=mode.error):
        run(model, mode)


@pytest.mark.parametrize("mode", of(HUB))
def test_a_mode_that_moved_to_the_hub_is_refused_by_transformers_itself(mode):
    model = llava()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"requires `trust_remote_code=True`.*{mode.error}"):
            run(model, mode)
        calibrated(model, preset="lossless")


ENTRANCES = {
    "generate_batch": lambda model: model.generate_batch([[5, 6, 7]], max_new_tokens=2),
    "init_continuous_batching": lambda model: model.init_continuous_batching(),
    "continuous_batching_context_manager": lambda model: model.continuous_batching_context_manager().__enter__(),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_continuous_batching_is_refused_by_every_entrance_until_restore(name):
    model = calibrated(llava(), preset="lossless")
    with pytest.raises(
        ValueError, match=f"{name}: continuous batching is refused for now: it keeps all requests in a paged"
    ):
        ENTRANCES[name](model)
    apack_compile.restore(model)
    assert not set(ENTRANCES) & set(vars(model)) and "get_compiled_call" not in vars(model)


def test_every_name_of_continuous_batching_is_refused():
    offered = {name for name in vars(ContinuousMixin) if "batch" in name and "destroy" not in name and name[0] != "_"}
    assert offered == set(ENTRANCES)


def test_a_manager_of_continuous_batching_that_was_made_by_hand_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=1, eos_token_id=95, **sizes)).eval()
    limits = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    manager = ContinuousBatchingManager(model, GenerationConfig(max_new_tokens=2, eos_token_id=95), limits)
    calibrated(model, preset="lossless")
    manager.start()
    manager.add_request([5, 6, 7], max_new_tokens=2)
    result = manager.get_result(timeout=60)
    manager.stop(block=True, timeout=60)
    assert "continuous batching is refused for now" in result.error


@pytest.mark.parametrize("compile", ["none", "eager"])
def test_several_turns_hand_the_packed_cache_on(compile):
    def talk(model):
        said, cache, turns = TEXT["input_ids"], None, []
        for length in (5, 40, 12):
            more = torch.randint(2, 80, (1, length), generator=torch.Generator().manual_seed(length))
            said = torch.cat([said, more], 1)
            inputs = {"input_ids": said, "attention_mask": torch.ones_like(said)}
            out = greedy(model, inputs, 20, past_key_values=cache, return_dict_in_generate=True)
            said, cache = out.sequences, out.past_key_values
            turns.append(said)
        return turns, cache

    model = llava()
    dense, _ = talk(model)
    packed, cache = talk(calibrated(model, compile, preset="lossless"))
    assert all(torch.equal(*pair) for pair in zip(packed, dense, strict=True))
    assert isinstance(cache, apack_compile.CompactedCache) and int(cache.get_seq_length()) == dense[-1].shape[1] - 1


def test_attention_weights_are_the_dense_ones_and_empty_slots_have_none():
    model = llava()
    model.set_attn_implementation("eager")
    settings = {"output_attentions": True, "return_dict_in_generate": True}
    dense = greedy(model, TEXT, 6, **settings)
    calibrated(model, "eager", preset="lossless")
    packed = greedy(model, TEXT, 6, **settings)
    held = dense.attentions[4][0].shape[-1]
    torch.testing.assert_close(packed.attentions[4][0][..., :held], dense.attentions[4][0], atol=1e-5, rtol=1e-4)
    assert packed.attentions[4][0].shape[-1] > held and not packed.attentions[4][0][..., held:].any()
    reasons = {line.reason for line in apack_compile.report(model).layers}
    assert all("the attention weights are used by" in reason for reason in reasons)
    calibrated(model, "eager", preset="lossless", strict=True)
    with pytest.raises(BackendCompilerFailed, match=r"StrictError: strict=True.*\n.*attention weights are used by"):
        greedy(model, TEXT, 6, **settings)


def test_prompts_padded_to_a_static_length_share_a_graph():
    model, prompts = llava(), []
    for length in (23, 47, 60):
        ids = torch.nn.functional.pad(TEXT["input_ids"][:, :length], (64 - length, 0))
        mask = (torch.arange(64) >= 64 - length)[None].long()
        prompts.append({"input_ids": ids, "attention_mask": mask})
    dense = [greedy(model, inputs) for inputs in prompts]
    calibrated(model, "eager", preset="lossless")
    assert all(torch.equal(greedy(model, inputs), want) for inputs, want in zip(prompts, dense, strict=True))
    assert len(apack_compile.report(model).graphs) == 1


def test_a_compile_config_of_the_caller_s_own_is_used_and_noted():
    model, seen = llava(), []
    dense = greedy(model, TEXT)
    calibrated(model, "eager", preset="lossless")

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    assert torch.equal(greedy(model, TEXT, compile_config=config), dense)
    report = apack_compile.report(model)
    assert seen and not report.graphs and any("compile_config is the caller's" in note for note in report.notes)


def test_a_chunked_prompt_has_the_plan_of_the_whole_one():
    model = calibrated(llava(), ratio=4)
    ids = torch.randint(2, 80, (1, 400), generator=torch.Generator().manual_seed(1))
    cache = apack_compile.new_cache(model)
    greedy(model, {"input_ids": ids}, 3, prefill_chunk_size=50, past_key_values=cache)
    assert cache.index.plan is apack_compile.plan_for(model, 400) is not apack_compile.plan_for(model, 50)


def test_chunks_do_not_calibrate():
    model = apack_compile.optimize(llava(), ratio=4, compile="none", min_tokens=0)
    with pytest.raises(ValueError, match=r"prefill_chunk_size: with ratio=4 .*call apack_compile\.calibrate"):
        greedy(model, TEXT, 3, prefill_chunk_size=10)


def test_a_prompt_too_short_to_calibrate_says_what_to_do():
    model = apack_compile.optimize(llava(), ratio=4, compile="none", min_tokens=0)
    with pytest.raises(ValueError, match=r"ratio=4: the first request cannot serve .* call apack_compile\.calibrate"):
        greedy(model, {"input_ids": torch.tensor([[5, 6, 7]])}, 3)


def test_a_drafted_picture_token_stays_text():
    model = calibrated(llava(), preset="lossless")
    cache = apack_compile.new_cache(model)
    greedy(model, picture([60, 20]), 40, past_key_values=cache)
    assert int((cache.index.positions[1] >= 0).sum()) == 4


def test_the_table_of_the_documentation_is_this_one():
    document = Path(__file__).parents[2] / "docs" / "guides" / "generate.md"
    assert table() in document.read_text()
