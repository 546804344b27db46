"""Layers that see only the newest tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pair import HEAD_DIM
from windowed_pair import PLANS, WINDOWS, WindowedPair

from apack_compile.cache.layer import MAX_APPEND
from apack_compile.cache.token_index import MAX_CROP
from apack_compile.plan.ring import block_for, ring_slots, whole_blocks
from apack_compile.plan.rotation import deinterleaved_keys


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(PLANS), st.sampled_from(sorted(WINDOWS)))
def test_any_sequence_of_operations_keeps_every_token_that_is_seen(data, plan, windows):
    pair = WindowedPair(
        plan, WINDOWS[windows], batch=data.draw(st.integers(1, 3)), seed=data.draw(st.integers(0, 10**6))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        names = ("chunk", "append", "append", "crop", "reorder", "repeat", "select", "reset", "record")
        step = data.draw(st.sampled_from(names)) if pair.held else "chunk"
        if step == "chunk":
            count = data.draw(st.integers(1 if pair.held else 4, 80))
            pair.feed(count, *data.draw(flags(pair, count)))
        elif step == "append":
            count = data.draw(st.sampled_from((1, 1, 2, 7, MAX_APPEND)))
            for _ in range(data.draw(st.integers(1, 60 if count == 1 else 4))):
                pair.feed(count)
        elif step == "crop":
            count = min(data.draw(st.integers(0, 30)), pair.cache.croppable)
            pair.cache.crop(-count)
            left = pair.held - count
            pair.change(lambda x, n=left: x[:, :, :n], lambda x, n=left: x[:, :n])
        elif step == "record":
            pair.cache.activate_past_recording()
        elif step == "reset":
            pair.cache.reset()
            pair.forget()
            continue
        else:
            rows = torch.randint(0, pair.batch, (pair.batch,), generator=pair.generator)
            if step == "reorder":
                pair.cache.reorder_cache(rows)
            elif step == "select":
                rows = rows[: data.draw(st.integers(1, pair.batch))]
                pair.cache.batch_select_indices(rows)
            else:
                repeats = data.draw(st.integers(1, 2 if pair.batch < 4 else 1))
                pair.cache.batch_repeat_interleave(repeats)
                rows = torch.arange(pair.batch).repeat_interleave(repeats)
            pair.change(lambda x, rows=rows: x[rows], lambda x, rows=rows: x[rows])
        pair.check()


@st.composite
def flags(draw, pair, count):
    """Vision tokens anywhere, padding on the left of a first chunk that leaves every row four tokens."""
    vision = padding = None
    if draw(st.booleans()):
        vision = torch.rand(pair.batch, count, generator=pair.generator) < draw(st.sampled_from((0.1, 0.9)))
    if ((pair.held == 0 and count > 4) or count > MAX_APPEND) and draw(st.booleans()):
        most = torch.randint(0, count - 3, (pair.batch, 1), generator=pair.generator)
        padding = torch.arange(count) < most
        vision = None if vision is None else vision & ~padding
    return vision, padding


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("windows", ("sliding", "long"))
@pytest.mark.parametrize("prompt", (5, 90))
def test_a_long_generation_takes_no_more_slots_than_its_windows(plan, windows, prompt):
    pair = WindowedPair(plan, WINDOWS[windows])
    pair.feed(prompt)
    addresses = None
    for step in range(120):
        pair.feed(1)
        if step == 90:
            addresses = tensors(pair)
    pair.check()
    if plan == "sequence":
        return
    assert tensors(pair) == addresses, "slots are reused where they are"
    for group in pair.cache.groups:
        if group.window is not None:
            slots = ring_slots(group.window, group.index.plan.tail_slots, group.block)
            # of a prompt, the newest tokens can be cropped: as many more are stored
            text = group.window - 1 + MAX_CROP - group.index.plan.tail_slots
            prompted = whole_blocks(text, group.block) if prompt > group.window else 0
            assert group.index.positions[2].shape[1] == max(slots, prompted) == group.layers[0].text_slots
            assert slots < group.window + 2 * group.block


def tensors(pair):
    """Addresses of what belongs to windows."""
    groups = [group for group in pair.cache.groups if group.window is not None]
    return [
        t.data_ptr()
        for group in groups
        for t in (
            *group.index.positions,
            *group.index.rotations,
            *(t for x in group.layers for t in (*x.packed_tensors(), x.cursor)),
        )
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_a_crop_across_the_place_where_the_ring_begins_again_goes_on_right(plan):
    for generated in range(1, 60, 7):
        pair = WindowedPair(plan, WINDOWS["sliding"], batch=1)
        pair.feed(40)
        for _ in range(generated):
            pair.feed(1)
        pair.cache.activate_past_recording()
        pair.feed(20)
        pair.cache.crop(-17)
        pair.change(lambda x, n=pair.held - 17: x[:, :, :n], lambda x, n=pair.held - 17: x[:, :n])
        for _ in range(20):
            pair.feed(1)
        pair.check()


def test_a_drafting_cache_forgets_nothing_before_it_is_cropped():
    pair = WindowedPair("relative", WINDOWS["sliding"], batch=1)
    pair.feed(40)
    pair.cache.activate_past_recording()
    for _ in range(70):
        pair.feed(1)
    assert pair.cache.croppable >= 70
    pair.cache.crop(-70)
    pair.change(lambda x: x[:, :, :40], lambda x: x[:, :40])
    pair.check()
    for _ in range(50):
        pair.feed(1)
        pair.cache.crop(0)
    pair.check()


def test_what_is_out_of_the_window_cannot_come_back():
    pair = WindowedPair("no tail", WINDOWS["sliding"], batch=1)
    pair.feed(40)
    for _ in range(60):
        pair.feed(1)
    loose = pair.cache.croppable
    assert loose < 60
    with pytest.raises(ValueError, match=f"cannot remove {loose + 1} of 100"):
        pair.cache.crop(-loose - 1)
    pair.check()


@pytest.mark.parametrize("plan", PLANS)
def test_attention_over_a_ring_is_attention_over_its_decoded_states(plan):
    pair = WindowedPair(plan, WINDOWS["one full"])
    pair.feed(70)
    for _ in range(31):
        pair.feed(1)
    layer, window = pair.cache.packed_layers[0], 12
    query, key, value = (torch.randn(2, heads, 1, HEAD_DIM, generator=pair.generator) for heads in (4, 2, 2))
    pair.cache.reserve(1)
    layer.append(deinterleaved_keys(key, layer.index.plan.rotation), value)
    held = pair.held + 1
    column = torch.arange(held)
    mask = (column > held - 1 - window)[None, None, None].expand(2, 1, 1, held)
    new = deinterleaved_keys(key, layer.index.plan.rotation), value
    states = layer.unpacked(*new, held)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.double(), *(x.double() for x in states), attn_mask=mask, enable_gqa=True
    )
    found = layer.attend(query, *new, mask, HEAD_DIM**-0.5)
    torch.testing.assert_close(found.double(), wanted, atol=1e-3, rtol=1e-3)
    exact = [torch.cat(both, 2).double() for both in zip(pair.dense[0], (key, value), strict=True)]
    dense = torch.nn.functional.scaled_dot_product_attention(query.double(), *exact, attn_mask=mask, enable_gqa=True)
    assert float((found - dense).norm() / dense.norm()) < 0.1


@pytest.mark.parametrize(("window", "block"), ((1024, 64), (512, 64), (511, 32), (128, 16), (24, 16), (4096, 64)))
def test_a_block_is_a_small_part_of_its_window(window, block):
    assert block_for(window, 64) == block
    assert block_for(window, 1) == 1 and block_for(window, 8) == 8
