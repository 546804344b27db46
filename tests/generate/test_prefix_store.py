"""What a store of prefixes tells apart, and what becomes of files that cannot be used."""

import os

import pytest
import torch
from llava_and_draft import calibrated, llava, picture
from tiny_llama import gemma3

import apack_compile
from apack_compile import PrefixStore
from apack_compile.generate.prefix_store import key_of
from apack_compile.generate.session import session_of
from apack_compile.models.weights import weights_digest


def key(model, **inputs) -> str:
    return key_of(model, session_of(model), inputs)


def files(store: PrefixStore) -> list:
    return sorted(store.directory.glob("*.prefix"))


def test_inputs_are_told_apart_by_all_their_numbers():
    model = calibrated(llava(), preset="lossless")
    one = torch.zeros(3, 90, 90)
    other = one.clone()
    other[1, 40, 40] = 1
    assert repr(one) == repr(other)
    nested = [
        x
        for part in (one, other, one.double(), one.view(90, 3, 90))
        for x in (part, [part], [[part]], [part, part], {"picture": part}, {"other": part})
    ]
    plain = [None, True, 1, 1.0, "1", "True", [1, 2], [[1], 2], [[1, 2]], [], {}, ["a\nb"], ["a", "b"]]
    keys = [key(model, pixel_values=x) for x in (*nested, *plain)]
    assert len(set(keys)) == len(keys)
    assert key(model, x=[one, (1, None)]) == key(model, x=(one.clone(), [1, None]))
    for bad in (object(), [one, {1}], {"x": one.numpy()}):
        with pytest.raises(ValueError, match=r"pixel_values: a .* cannot be told from others"):
            key(model, input_ids=torch.zeros(1, 3), pixel_values=bad)


def test_pictures_in_a_list_are_told_apart(tmp_path):
    model, inputs = calibrated(llava(), preset="lossless"), picture([150, 90])
    store, passes = PrefixStore(tmp_path, 10**9), []
    model.register_forward_hook(lambda *_: passes.append(1))
    # the model takes a tensor alone, which a hook makes of the list
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"pixel_values": kwargs["pixel_values"][0]}), with_kwargs=True
    )
    pixels = inputs.pop("pixel_values")
    for shift in (0, 1):
        store.read(model, **inputs, pixel_values=[pixels + shift])
    assert len(passes) == len(files(store)) == 2


def test_the_digest_follows_adapters_and_rotary_settings():
    peft = pytest.importorskip("peft")
    model = gemma3()
    before = weights_digest(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2), adapter_name="one")
    tuned.add_adapter("two", peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
    tuned.set_adapter("one")
    one = weights_digest(model)
    tuned.set_adapter("two")
    two = weights_digest(model)
    with tuned.disable_adapter():
        none = weights_digest(model)
    tuned.set_adapter("one")
    assert weights_digest(model) == one and len({before, one, two, none}) == 4
    for module in tuned.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("one", 0.5)
    assert weights_digest(model) not in (before, one, two, none), "how much an adapter is scaled is no parameter"


def test_a_file_of_other_rotary_settings_is_refused(tmp_path):
    model, other = calibrated(llava(), preset="lossless"), llava()
    path = tmp_path / "prefix"
    apack_compile.read(model, **picture()).save(path)
    other.config.get_text_config(decoder=True).rope_parameters["rope_theta"] *= 2
    with pytest.raises(ValueError, match="other weights, adapters or rotary settings"):
        apack_compile.load_prefix(calibrated(other, preset="lossless"), path)


def test_a_loaded_prefix_stays_where_its_file_was_removed_meanwhile(tmp_path, monkeypatch):
    model, inputs, store = calibrated(llava(), preset="lossless"), picture(), PrefixStore(tmp_path, 10**9)
    store.read(model, **inputs)
    passes, utime = [], os.utime
    model.register_forward_hook(lambda *_: passes.append(1))

    def late(path):
        os.remove(path)
        utime(path)

    monkeypatch.setattr(os, "utime", late)
    assert store.read(model, **inputs).length == inputs["input_ids"].shape[1]
    assert not passes and not files(store)


def test_a_file_that_alone_exceeds_the_limit_goes_and_the_others_stay(tmp_path):
    model, store = calibrated(llava(), preset="lossless"), PrefixStore(tmp_path, 10**9)
    store.read(model, **picture([40, 30]))
    (small,) = files(store)
    large = store.read(model, **picture([90, 60]))
    size = max(path.stat().st_size for path in files(store))
    next(path for path in files(store) if path != small).unlink()
    limited = PrefixStore(tmp_path, size - 1)
    assert small.stat().st_size <= limited.limit_bytes and large.nbytes <= limited.limit_bytes
    limited.read(model, **picture([90, 60]))
    assert files(store) == [small]


def test_a_file_that_cannot_be_used_is_noted(tmp_path):
    model, inputs, store = calibrated(llava(), ratio=4), picture([150, 90]), PrefixStore(tmp_path, 10**9)
    assert not store.read(model, **inputs)._cache.notes
    files(store)[0].write_bytes(b"cut")
    prefix = store.read(model, **inputs)
    (note,) = prefix._cache.notes
    assert note.startswith("store: the file that was kept could not be used") and "not a whole safetensors" in note
    assert note in apack_compile.report(model).notes
    assert not store.read(model, **inputs)._cache.notes


def test_a_store_follows_a_model_that_changed_its_dtype(tmp_path):
    model, inputs, store = calibrated(llava(), preset="lossless"), picture(), PrefixStore(tmp_path, 10**9)
    store.read(model, **inputs)
    model.bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for _ in range(2):
        store.read(model, **inputs)
    assert len(files(store)) == 2
