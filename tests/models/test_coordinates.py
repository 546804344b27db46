"""Relative keys where a token's position has three coordinates: multi-section RoPE."""

import copy
from dataclasses import replace
from itertools import pairwise
from threading import Thread

import pytest
import torch
from matrix.building import build as build_any
from matrix.building import case_of, class_names
from matrix.prompts import pixels_for, prompt_for
from multi_section import COORDINATES, MODELS, build, prompt
from transformers.cache_utils import DynamicCache
from vlms import build as small_vlm
from vlms import prompt as vlm_prompt

import apack_compile
from apack_compile import AttentionPackConfig, Plan
from apack_compile.backend.own_cache import OwnCaches
from apack_compile.cache.layer_kinds import layer_kinds
from apack_compile.calibration.collect import Observations, collect
from apack_compile.calibration.find_rotation import find_rotation
from apack_compile.calibration.sensitivity import observe
from apack_compile.errors import StrictError
from apack_compile.generate.session import session_of
from apack_compile.kernels.format import Bands
from apack_compile.models.coordinates import TokenCoordinates, replaced_positions, rotary_modules
from apack_compile.plan.coarse_rule import unrotated
from apack_compile.plan.plan import LayerPlan, StreamPlan

ROWS = {"one-row": [[40, 50, 60]], "rows-of-other-pictures-padded": [[20, 70], [30, 40, 25, 90]]}
BLOCK = 16


def relative(name: str, key_block: int = BLOCK, strict: bool = True, compile: str = "none"):
    """A model, optimized and calibrated."""
    config = AttentionPackConfig(ratio=2, key_block=key_block, compile=compile, strict=strict, min_tokens=0)
    model = apack_compile.optimize(build(name), config)
    return apack_compile.calibrate(model, [prompt([[50, 60, 120]], seed=1), prompt([[90, 80, 60]], seed=2)])


def exact_plan(model) -> Plan:
    """Every component in 16 bits, in bases of keys that were rotated back."""
    plan = apack_compile.plan_for(model, 200, 0.25)
    bases, layers = {}, {}
    for layer, segments in session_of(model).calibration.statistics.items():
        spectra = [segments[name][i].spectrum for name in ("vision", "text") for i in range(2)]
        bands = Bands((spectra[0].mean.shape[-1], 0, 0, 0))
        bases[layer] = tuple(spectrum.basis(bands) for spectrum in spectra)
        layers[layer] = LayerPlan(*[StreamPlan("model", bands, True)] * 4)
    return replace(plan, layers=layers, bases=bases)


def exact(name: str, strict: bool = True, compile: str = "none"):
    """A model that packs everything by an exact plan with relative keys."""
    model = relative(name)
    return apack_compile.optimize(model, plan=exact_plan(model), compile=compile, strict=strict)


def read_back(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of every layer, as `unpack` gives them."""
    found = []
    for layer in cache.packed_layers:
        none = torch.empty(layer.batch_size, layer.num_heads, 0, 16)
        tokens = int(layer.get_seq_length())
        found.append(torch.ops.apack.unpack.default(none, none, *layer.state().flatten(), tokens))
    return found


def assert_held(cache, dense: DynamicCache, mask: torch.Tensor) -> None:
    """A packed cache gives back what the dense one holds, up to rounding to 16 bits."""
    real = mask.bool()
    for found, layer in zip(read_back(cache), dense.layers, strict=True):
        for got, expected in zip(found, (layer.keys, layer.values), strict=True):
            got, expected = got.transpose(1, 2)[real], expected.transpose(1, 2)[real]
            assert (got - expected).norm() < 2e-3 * expected.norm()


def rope_index(model, inputs) -> torch.Tensor:
    """The model's own coordinates `[3, B, T]` of a prompt."""
    given = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    return model.model.get_rope_index(**{name: inputs[name] for name in given})[0]


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=20, do_sample=False, **kwargs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_coordinate_of_each_pair_is_found(name, dtype):
    rotation, reason = find_rotation(build(name).to(dtype), [0, 1], prompt([[30, 9]]), BLOCK)
    assert rotation.coordinates.tolist() == COORDINATES[name]
    assert rotation.coordinate_count == 3 and rotation.block == BLOCK
    assert reason.endswith("language_model.rotary_emb.inv_freq, each pair by one of 3 coordinates")


@pytest.mark.parametrize("name", MODELS)
def test_the_coordinate_of_a_slow_pair_is_found_in_low_precision(name):
    model = build(name).to(torch.bfloat16)
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq.copy_(1e6 ** -(torch.arange(8) / 8))
    rotation, _ = find_rotation(model, [0, 1], prompt([[30, 9]]), BLOCK)
    assert rotation.frequencies.min() < 1e-5
    assert rotation.coordinates.tolist() == COORDINATES[name]


def test_a_vision_tower_with_the_same_frequencies_does_not_matter():
    model, placeholders = small_vlm("qwen2_5_vl")
    buffers = dict(model.named_buffers())
    tower = buffers["model.visual.rotary_pos_emb.inv_freq"]
    assert torch.equal(tower, buffers["model.language_model.rotary_emb.inv_freq"])
    rotation, reason = find_rotation(model, [0, 1], vlm_prompt("qwen2_5_vl", [[30, 9]], placeholders), BLOCK)
    assert rotation.coordinates.tolist() == [0, 1, 2, 2] and "language_model" in reason


@pytest.mark.parametrize(
    ("model_type", "coordinates", "said"),
    [
        ("qwen3_5", [0, 1], "each pair by one of 3 coordinates"),
        ("hunyuan_vl", [0, 0, 0, 0, 1, 1, 1, 1], "the other has another (no difference in text)"),
    ],
)
def test_the_coordinates_of_other_models_are_found(model_type, coordinates, said):
    if model_type not in class_names():
        pytest.skip(f"this transformers has no {model_type}")
    model = build_any(model_type)
    batch = prompt_for(model, pixels_for(model), case_of(model_type).placeholders, 40)
    full = [kind.layer for kind in layer_kinds(model) if kind.reason is None]
    rotation, reason = find_rotation(model, full, batch, BLOCK)
    assert rotation is not None and rotation.coordinates.tolist() == coordinates, (reason, rotation)
    assert reason.endswith(said)


def test_pairs_that_rotate_by_no_single_coordinate_are_refused():
    model = build("qwen2_vl")

    def by_the_mean(rotary, args, output):
        return rotary.forward(args[0], args[1].float().mean(0, keepdim=True))

    model.model.language_model.rotary_emb.register_forward_hook(by_the_mean)
    rotation, reason = find_rotation(model, [0, 1], prompt([[30, 9]]), BLOCK)
    assert rotation is None and "3 coordinates, and pairs do not rotate by one of them each" in reason


@pytest.mark.parametrize("name", MODELS)
def test_keys_of_a_token_rotated_back_by_its_coordinates_are_the_same_anywhere(name):
    model, cache = build(name), DynamicCache()
    rotation, _ = find_rotation(model, [0, 1], prompt([[30, 9]]), BLOCK)
    positions = torch.randint(0, 500, (3, 1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), replaced_positions(model.model.language_model.rotary_emb, positions):
        model(input_ids=torch.full((1, 40), 7), past_key_values=cache)
    keys, places = cache.layers[1].keys, positions.permute(1, 2, 0)
    still = unrotated(keys, places, rotation)
    torch.testing.assert_close(still, still[:, :, :1].expand_as(still), atol=1e-4, rtol=1e-4)
    swapped = unrotated(keys, places.flip(-1), rotation)
    assert not torch.allclose(swapped, swapped[:, :, :1].expand_as(swapped), atol=1e-2)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_rotates_keys_by_the_coordinates_of_the_model_and_gives_them_back(name, rows):
    model, inputs = exact(name), prompt(rows)
    cache, dense = apack_compile.new_cache(model, 8), DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        for one in (cache, dense):
            model(**inputs, past_key_values=one)
    assert_held(cache, dense, inputs["attention_mask"])
    index, expected = cache.index, rope_index(model, inputs)
    assert [rotations.shape[1] for rotations in index.rotations] == [
        -(-p.shape[1] // BLOCK) + 1 for p in index.positions[1:]
    ]
    frequencies = model.model.language_model.rotary_emb.inv_freq
    held = inputs["input_ids"].shape[1]
    for positions, rotations in zip(index.positions[1:], index.rotations, strict=True):
        for row in range(len(rows)):
            for block, anchor in enumerate(positions[row, ::BLOCK].tolist()):
                if anchor >= 0:
                    # text to come counts up from the prompt's last token
                    last = expected[:, row, min(anchor, held - 1)] + max(anchor - held + 1, 0)
                    angles = last[torch.tensor(COORDINATES[name])] * frequencies
                    torch.testing.assert_close(rotations[row, block], torch.stack([angles.cos(), angles.sin()]))
    assert cache.notes == []


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_decoding_reads_what_a_dense_cache_would_compiled_or_not(name, rows):
    inputs, plan = prompt(rows), exact_plan(relative(name))
    model = apack_compile.optimize(build(name), plan=plan, compile="none", strict=True)
    tokens = generate(model, inputs)
    compiled = apack_compile.optimize(build(name), plan=plan, compile="eager", strict=True)
    assert torch.equal(generate(compiled, inputs), tokens)
    assert all(line.status == "rewritten" for line in apack_compile.report(compiled).layers)
    said = apack_compile.report(compiled).keys
    assert said == f"rotated back to the start of their {BLOCK} slots, each pair by one of 3 coordinates"
    told = tokens[:, inputs["input_ids"].shape[1] :]
    cache, dense = apack_compile.new_cache(model, 8), DynamicCache(config=model.config.get_text_config())
    mask = inputs["attention_mask"]
    with torch.no_grad():
        for one in (cache, dense):
            model(**inputs, past_key_values=one)
        after = rope_index(model, inputs)[:, :, -1:]
        for i in range(told.shape[1]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": told[:, i : i + 1], "attention_mask": mask, "position_ids": after + i + 1}
            found, expected = (model(**step, past_key_values=one).logits for one in (cache, dense))
            assert (found - expected).norm() < 0.02 * expected.norm()
    assert_held(cache, dense, mask)


def test_a_prompt_in_chunks_and_a_turn_with_more_pictures_keep_every_key():
    model, inputs = exact("qwen3_vl"), prompt([[60, 45, 80], [50, 30, 105]], seed=4)
    cache, dense = apack_compile.new_cache(model, 8), DynamicCache(config=model.config.get_text_config())
    places, total = rope_index(model, inputs), inputs["input_ids"].shape[1]
    pictures = inputs["pixel_values"].unflatten(0, (4, 48))
    # one picture of each row in the first chunk, the others in the second, text in the third and fourth
    bounds = [0, 80, 150, 152, total]
    for i, (start, end) in enumerate(pairwise(bounds)):
        chunk = {
            "input_ids": inputs["input_ids"][:, start:end],
            "attention_mask": inputs["attention_mask"][:, :end],
            "position_ids": places[:, :, start:end],
        }
        if i < 2:
            chunk["pixel_values"] = pictures[[i, 2 + i]].flatten(0, 1)
            chunk["image_grid_thw"] = inputs["image_grid_thw"][:2]
            assert (chunk["input_ids"] == 90).sum(1).tolist() == [12, 12]
        with torch.no_grad():
            for one in (cache, dense):
                model(**chunk, past_key_values=one)
        assert_held(cache, dense, inputs["attention_mask"][:, :end])
    known = cache.index.coordinates.at(torch.arange(total).expand(2, -1))
    assert torch.equal(known, places.permute(1, 2, 0).float())
    assert torch.equal(cache.index.coordinates.shift[:, 0, 0], places[0, :, -1] + 1.0 - total)
    assert cache.notes == []


@pytest.mark.parametrize("name", MODELS)
def test_a_first_request_of_embeddings_serves_as_calibration(name):
    model, inputs = build(name), prompt([[200], [140]])
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    apack_compile.optimize(model, ratio=2, compile="none", strict=True, min_tokens=0)
    assert generate(model, given).shape == (2, 20)
    report = apack_compile.report(model)
    assert report.keys.endswith("each pair by one of 3 coordinates") and report.bytes["tokens"] == 2 * 219


WAYS = {
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 37},
    "lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ways_to_generate_see_every_coordinate(way):
    model, inputs = exact("qwen3_vl"), prompt([[40, 50, 60]] if "prompt_lookup_num_tokens" in way else [[60], [40]])
    if "prefill_chunk_size" in way:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        try:
            build("qwen3_vl").generate(**inputs, max_new_tokens=1, **way)
        except RuntimeError as error:
            pytest.skip(f"this transformers cannot read such prompts in chunks: {error}")
    cache = apack_compile.new_cache(model, 8)
    torch.manual_seed(0)
    model.generate(**inputs, max_new_tokens=40, past_key_values=cache, **{"do_sample": False, **way})
    known, real = cache.index.coordinates, inputs["attention_mask"].bool()
    per_row = known.known.shape[0] // len(real)
    expected = rope_index(model, inputs) if "image_grid_thw" in inputs else (real.cumsum(1) - 1).expand(3, -1, -1)
    for row, each in enumerate(known.at(torch.arange(real.shape[1]).expand(len(known.known), -1))):
        assert torch.equal(each[real[row // per_row]], expected.permute(1, 2, 0)[row // per_row][real[row // per_row]])
    assert known.shift.unique().numel() == len(real) and cache.notes == []


def test_a_plan_keeps_its_coordinates_in_a_file(tmp_path):
    model, inputs = relative("qwen2_5_vl"), prompt([[40, 50, 60]])
    plan = apack_compile.plan_for(model, 200, 0.25)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.rotation.coordinates.dtype == torch.int64
    assert loaded.rotation.coordinates.tolist() == COORDINATES["qwen2_5_vl"]
    served = apack_compile.optimize(build("qwen2_5_vl"), plan=loaded, compile="none", strict=True)
    again = apack_compile.optimize(model, plan=plan, compile="none", strict=True)
    caches = [apack_compile.new_cache(one, 8) for one in (served, again)]
    for one, cache in zip((served, again), caches, strict=True):
        generate(one, inputs, past_key_values=cache)
        assert cache.index.coordinates.known.shape == (1, inputs["input_ids"].shape[1], 3)
    for one, other in zip(*(read_back(cache) for cache in caches), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", MODELS)
def test_fewer_components_explain_keys_rotated_back_by_their_coordinates_than_by_their_index(name):
    model, inputs = build(name), [prompt([[30, *[2] * 20, 120]], seed=i) for i in range(2)]
    rotation, _ = find_rotation(model, [0, 1], inputs[0], block=1)
    by_all, by_one = (
        collect(Observations(model, [0, 1], inputs, t), coarse=())[0]
        for t in (rotation, replace(rotation, coordinates=None))
    )
    for layer in range(2):
        for modality in ("vision", "text"):
            shares = []
            for statistics in (by_all, by_one):
                variance = statistics[layer][modality][0].spectrum.deviation.square().flatten()
                shares.append(float(variance[:4].sum() / variance.sum()))
            assert shares[0] > shares[1] + 0.015
            values = [s[layer][modality][1].spectrum.deviation for s in (by_all, by_one)]
            assert torch.equal(*values)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_calibration_on_a_processor_s_output_counts_on_after_the_pictures(rows):
    model, inputs = build("qwen2_5_vl"), prompt(rows)
    seen = observe(model, inputs, [0])
    real = inputs["attention_mask"].bool()
    assert seen.queries > 0 and torch.equal(seen.positions[:, real], rope_index(model, inputs)[:, real])


def test_a_prefill_compiled_by_hand_hides_its_coordinates_which_is_noted_and_refused_when_strict():
    inputs = prompt([[40, 50, 60]])
    for strict in (False, True):
        model = exact("qwen2_vl", strict=strict)
        cache, dense = apack_compile.new_cache(model, 8), DynamicCache(config=model.config.get_text_config())
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            if strict:
                with pytest.raises(StrictError, match="rotary coordinates were not seen"):
                    compiled(**inputs, past_key_values=cache)
                assert not cache.is_filled
                continue
            compiled(**inputs, past_key_values=cache)
            model(**inputs, past_key_values=dense)
        assert_held(cache, dense, inputs["attention_mask"])
        assert any("rotary coordinates were not seen" in note for note in cache.notes)


def test_passes_of_two_threads_see_their_own_coordinates():
    model, others = exact("qwen2_vl"), prompt([[70, 30, 78]], seed=5)
    inputs = prompt([[40, 50, 60]])
    cache, other = apack_compile.new_cache(model, 8), apack_compile.new_cache(model, 8)
    threads = []

    def run_the_other(module, args):
        if not threads:
            threads.append(Thread(target=lambda: model(**others, past_key_values=other)))
            threads[0].start()
            threads[0].join()

    model.model.language_model.embed_tokens.register_forward_pre_hook(run_the_other)
    # rope_deltas belong to the model, so the other prompt has as many tokens and pictures as this one
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for one, given in ((cache, inputs), (other, others)):
        assert torch.equal(one.index.coordinates.known, rope_index(model, given).permute(1, 2, 0).float())
        assert one.notes == []


def test_hooks_come_and_go_with_the_session():
    model = apack_compile.optimize(build("qwen2_vl"), ratio=2, compile="none", strict=True, min_tokens=0)
    modules = rotary_modules(model)
    assert len(modules) == 2 and not any(module._forward_pre_hooks for module in modules)
    generate(model, prompt([[90, 80, 60]]))
    assert [len(module._forward_pre_hooks) for module in modules] == [1, 1]
    assert apack_compile.report(model).notes == ()
    apack_compile.calibrate(model, prompt([[90, 80, 60]]))
    apack_compile.optimize(model, ratio=3, compile="none", strict=True, min_tokens=0)
    assert [len(module._forward_pre_hooks) for module in modules] == [1, 1]
    assert apack_compile.plan_for(model, 200).rotation.coordinate_count == 3
    apack_compile.optimize(model, AttentionPackConfig(ratio=3, key_block=0, compile="none", min_tokens=0))
    assert not any(module._forward_pre_hooks for module in modules)
    apack_compile.restore(model)
    assert not any(module._forward_pre_hooks for module in modules)


def test_a_copied_model_shows_coordinates_to_its_own_caches():
    model, inputs = relative("qwen2_vl"), prompt([[40, 50, 60]])
    twin = copy.deepcopy(model)
    apack_compile.restore(model)
    cache = apack_compile.new_cache(twin, 8)
    generate(twin, inputs, past_key_values=cache)
    assert torch.equal(cache.index.coordinates.known, rope_index(twin, inputs).permute(1, 2, 0).float())
    apack_compile.restore(twin)
    assert not any(module._forward_pre_hooks for one in (model, twin) for module in rotary_modules(one))


def test_a_model_may_change_its_dtype_after_calibration():
    model = relative("qwen3_vl").to(torch.bfloat16)
    inputs = prompt([[40, 50, 60]])
    cache = apack_compile.new_cache(model, 8)
    generate(model, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}, past_key_values=cache)
    assert torch.equal(cache.index.coordinates.known, rope_index(model, inputs).permute(1, 2, 0).float())
    assert cache.index.plan.rotation.frequencies.dtype == torch.float32


def test_static_buffers_refuse_keys_that_rotate_by_several_coordinates():
    plan = apack_compile.plan_for(relative("qwen2_vl"), 200, 0.25)
    with pytest.raises(ValueError, match=r"option plan: its keys rotate by several coordinates .*key_block=0"):
        OwnCaches(4.0, plan)


def test_known_coordinates_stay_when_more_follow():
    start = TokenCoordinates.starting_at(torch.tensor([[0], [2]]), 3)
    assert start.at(torch.tensor([[5, 6], [5, 6]])).tolist() == [[[5.0] * 3, [6.0] * 3], [[3.0] * 3, [4.0] * 3]]
    chunk = torch.tensor([[[0, 0, 0], [1, 2, 3], [1, 2, 4]], [[9, 9, 9], [9, 9, 9], [0, 0, 0]]]).float()
    padding = torch.tensor([[False, False, False], [True, True, False]])
    first = start.followed_by(chunk, padding, 0)
    assert first.at(torch.tensor([[2, 3, 4], [2, 3, 4]]))[..., 0].tolist() == [[1.0, 5.0, 6.0], [0.0, 1.0, 2.0]]
    more = torch.full((2, 2, 3), 20.0)
    none = torch.zeros(2, 2, dtype=torch.bool)
    second = first.followed_by(more, none, 5)
    index = torch.arange(5).expand(2, -1)
    assert torch.equal(second.at(index), first.at(index)), "stored keys were rotated by these"
    assert second.at(torch.tensor([[5, 7], [5, 7]]))[..., 1].tolist() == [[20.0, 21.0]] * 2
    assert torch.equal(first.followed_by(more, ~none, 5).shift, first.shift), "padding says nothing"
    shortened = first.followed_by(more, none, 2)
    assert torch.equal(shortened.at(index[:, :2]), first.at(index[:, :2])) and shortened.known.shape[1] == 4
