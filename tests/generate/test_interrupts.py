"""What a forward pass that is interrupted (Ctrl+C, an exit, an error) leaves behind: nothing."""

import gc
import weakref

import pytest
import torch
from llava_and_draft import calibrated, greedy, llava, picture
from preset_rows import EVERY_PRESET
from torch.overrides import _get_current_function_mode_stack as function_modes
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import apack_compile

SETTINGS = [{"ratio": 4}, *EVERY_PRESET]


def interrupted(kind):
    def attention(*args, **kwargs):
        raise kind

    return attention


@pytest.mark.parametrize("kind", (KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError))
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_interrupted_prompt_leaves_no_mode_and_no_cache(setting, kind, monkeypatch):
    model, other, inputs = calibrated(llava(), **setting), llava(), picture([60, 20])
    dense = greedy(other, inputs, 4)
    cache = apack_compile.new_cache(model)
    alive = weakref.ref(cache)
    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", interrupted(kind))
        with pytest.raises(kind):
            greedy(model, inputs, 4, past_key_values=cache)
    assert not function_modes()
    assert torch.equal(greedy(other, inputs, 4), dense)
    del cache
    gc.collect()
    assert alive() is None


def test_an_error_while_room_is_made_is_said_at_the_next_use(monkeypatch):
    model, inputs = calibrated(llava(), ratio=4), picture([60, 20])
    cache = apack_compile.new_cache(model, 1)
    greedy(model, inputs, 2, past_key_values=cache)
    last = cache.packed_layers[-1]

    def full(slots):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(last, "grow", full)
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(500)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="cache: an error or an interrupt came while its tokens were moved: reset the cache"
    ):
        greedy(model, inputs, 2, past_key_values=cache)
