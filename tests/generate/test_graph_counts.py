"""One graph for each shape class, whatever else the process compiles; a step that is not compiled is not silent."""

import re

import pytest
import torch
from llava_and_draft import calibrated, greedy, llava, picture
from torch._dynamo.utils import counters

import apack_compile
from apack_compile import AttentionPackConfig, AttentionPackOptions
from apack_compile.errors import StrictError

QUANTIZED = AttentionPackConfig(
    preset="attentionpack", attentionpack=AttentionPackOptions(bits=4, evict=0.25), compile="eager", strict=True
)


def graphs(model) -> int:
    return len(apack_compile.report(model).graphs)


ONE_ROW, PADDED = [[75, 12]], [[75, 12], [8, 60], [20, 2, 3]]
CASES = [
    ({"preset": "lossless"}, ONE_ROW),
    ({"ratio": 4}, ONE_ROW),
    ({"preset": "lossless"}, PADDED),
    ({"ratio": 4}, PADDED),
    ({"ratio": 5.2, "tokens": 1_000}, PADDED),
    ({"preset": "a-vl"}, PADDED),
    ({"preset": "attentionpack"}, PADDED),
]


@pytest.mark.parametrize(("setting", "rows"), CASES, ids=[f"{setting}-{len(rows)}-rows" for setting, rows in CASES])
def test_64_steps_and_a_second_prompt_of_another_length_use_one_graph(setting, rows):
    options = {name: value for name, value in setting.items() if name != "tokens"}
    model = calibrated(llava(), "eager", strict=True, **options)
    if "tokens" in setting:
        plan = apack_compile.plan_for(model, setting["tokens"], 4 / 91)
        assert plan.coarse is not None
        apack_compile.optimize(model, plan=plan, compile="eager", strict=True)
    counters.clear()
    greedy(model, picture(*rows), 65)
    assert graphs(model) == 1
    longer = [[row[0] + 9, *row[1:]] for row in rows]
    greedy(model, picture(*longer, seed=1), 40)
    assert graphs(model) == 1 and not counters["graph_break"]


def test_options_of_a_preset_keep_one_graph():
    model = apack_compile.optimize(llava(), QUANTIZED)
    greedy(model, picture([75, 40]), 65)
    greedy(model, picture([90, 45]), 20)
    assert graphs(model) == 1


def test_sampling_uses_the_graph_of_greedy_decoding():
    model = calibrated(llava(), "eager", preset="lossless")
    greedy(model, picture([75, 40]), 5)
    for sequences in (1, 3):
        model.generate(**picture([60, 50], seed=2), do_sample=True, num_return_sequences=sequences, max_new_tokens=9)
        assert graphs(model) == sequences // 2 + 1


def test_beams_are_not_compiled_by_transformers():
    model = calibrated(llava(), "eager", preset="lossless")
    greedy(model, picture([75, 40]), 5, num_beams=3)
    assert graphs(model) == 0


def test_capacities_and_batch_sizes_cost_one_graph_more_each():
    model = calibrated(llava(), "eager", preset="lossless")
    seen = []
    for length in (100, 400, 700, 1000):
        greedy(model, picture([length, 10]), 3)
        seen.append(graphs(model))
    assert seen == [1, 2, 2, 2]
    for batch in (2, 3):
        greedy(model, picture(*[[100, 10]] * batch), 3)
    assert graphs(model) == 3


def test_plans_of_other_bands_have_graphs_of_their_own_past_dynamo_s_limit():
    model = calibrated(llava(), "eager", strict=True, ratio=4)
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (30, 300, 420, 600):
            greedy(model, picture([length]), 3)
    assert graphs(model) > 2
    assert not any("ran eagerly" in note for note in apack_compile.report(model).notes)


def test_models_of_one_process_do_not_share_dynamo_s_limit():
    kept = [calibrated(llava(), "eager", preset="lossless") for _ in range(3)]
    with torch._dynamo.config.patch(recompile_limit=1):
        for model in kept:
            greedy(model, picture([30, 5]), 3)
    assert [graphs(model) for model in kept] == [1, 1, 1]


def test_a_model_optimized_again_and_again_is_compiled_every_time():
    model = llava()
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            calibrated(model, "eager", preset="lossless")
            greedy(model, picture([30, 5]), 3)
            assert graphs(model) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_step_past_dynamo_s_limit_is_reported_and_refused_when_strict(strict):
    model = llava()
    dense = greedy(model, picture([30, 20], [30, 5]))
    calibrated(model, "eager", preset="lossless", strict=strict)
    greedy(model, picture([30, 20]), 3)
    with torch._dynamo.config.patch(recompile_limit=1):
        if strict:
            with pytest.raises(StrictError, match="a decode step that should be compiled ran eagerly"):
                greedy(model, picture([30, 20], [30, 5]))
            return
        assert torch.equal(greedy(model, picture([30, 20], [30, 5])), dense)
    notes = apack_compile.report(model).notes
    assert any("more graphs than torch._dynamo.config.recompile_limit=1" in note for note in notes)


def test_a_graph_has_nothing_that_waits_for_the_device():
    model = calibrated(llava(), "none", ratio=4)
    cache, seen = apack_compile.new_cache(model), []
    with torch.no_grad():
        model(**picture([75, 40]), past_key_values=cache)

        def backend(graph, _):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        step = torch.compile(lambda **inputs: model(**inputs), backend=backend, fullgraph=True)
        step(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert any("append" in name for name in seen)
    assert not [name for name in seen if re.search(r"\bitem\b|_local_scalar|nonzero|tolist", name)]


def test_a_traced_step_reads_one_list_of_each_layer():
    """Dynamo checks before every step whatever a step was traced to read, also the objects on the way."""
    model, names = calibrated(llava(), "none", preset="lossless"), []

    def seen(graph, inputs):
        names.extend(node.name for node in graph.graph.nodes if node.op == "placeholder")
        return graph.forward

    cache = apack_compile.new_cache(model, 64)
    greedy(model, picture([75, 12]), 3, past_key_values=cache)
    torch.compile(model.model.forward, backend=seen)(torch.tensor([[7]]), past_key_values=cache)
    read = [name for name in names if re.search(r"layers_\d+_(flat|pairs|first|tail|own|index)", name)]
    assert len(read) > 10 and all("_flat_tensors_" in name for name in read)
