"""What a report looks like: in a notebook, as a page, as a figure."""

import dataclasses
from html.parser import HTMLParser

import pytest
import tiny_llama
import torch
from saved_plans import windowed

import apack_compile
from apack_compile.models.device_memory import memory_bytes

VOID = {"meta"}


class Page(HTMLParser):
    """Elements with their attributes, text, and what was opened and never closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def bars(self, kind: str) -> list[float]:
        """Widths of the bars of a kind, in percent."""
        styles = [a["style"] for tag, a in self.elements if tag == "div" and a.get("class") == f"bar {kind}"]
        return [float(style.removeprefix("width: ").removesuffix("%")) for style in styles]


def optimized(build=tiny_llama.llama, **setting):
    model = build()
    apack_compile.optimize(model, compile="none", min_tokens=0, **setting)
    if "ratio" in setting:
        apack_compile.calibrate(model, {"input_ids": torch.randint(4, 40, (4, 300))})
    return model


@pytest.fixture(scope="module")
def report():
    model = optimized(ratio=3)
    model.generate(input_ids=torch.randint(4, 40, (2, 200)), max_new_tokens=3, do_sample=False, eos_token_id=None)
    return apack_compile.report(model)


def test_the_page_is_one_whole_file_without_anything_from_elsewhere(report, tmp_path):
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and page.open == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_the_page_has_a_row_and_bars_for_every_layer(report):
    page = Page(report._repr_html_())
    assert page.open == []
    dense, packed = page.bars("dense"), page.bars("packed")
    # those of the cache, then those of three equal layers
    assert len(dense) == len(packed) == 1 + 3
    assert dense == [100.0] * 4
    held = report.bytes
    assert packed[0] == pytest.approx(100 * held["sequence_bytes"] / held["dense_bytes"], abs=0.01)
    for width, layer in zip(packed[1:], report.layer_bytes, strict=True):
        assert width == pytest.approx(100 * layer.packed / layer.dense, abs=0.01)
        assert 0 < layer.lost < 1


def test_the_background_follows_the_reader_s_system_as_the_ink_does(report, tmp_path):
    report.save(tmp_path / "report.html")
    # a browser asks the root of a page, and not its body, for the scheme of the canvas
    assert ":root { color-scheme: light dark; }" in (tmp_path / "report.html").read_text(encoding="utf-8")
    # a notebook's own background may be of another scheme
    assert ".apack { color-scheme: light dark; background: Canvas;" in report._repr_html_()


def test_the_heads_of_numbers_stand_where_the_numbers_do(report):
    heads = [a.get("class") for tag, a in Page(report._repr_html_()).elements if tag == "th"]
    assert heads == [None, None, "number", "number", None, None, "number", None, None, None]


def test_a_part_of_a_few_bytes_is_not_said_to_be_nothing(report):
    held = report.bytes | {"parts": {"packed tokens and free slots": 9_990, "positions": 10}, "sequence_bytes": 10_000}
    page = Page(dataclasses.replace(report, bytes=held)._repr_html_())
    assert "100% packed tokens and free slots, under 1% positions" in page.text


def test_the_page_gives_the_bytes_and_the_notes_of_the_report(report):
    page = Page(report._repr_html_())
    for name in ("dense_bytes", "sequence_bytes", "model_bytes"):
        assert f"{report.bytes[name]:,}" in page.text
    assert f"{report.bytes['ratio']:.2f} times smaller" in page.text
    noted = dataclasses.replace(report, notes=("one & two", "three"))
    assert "one & two" in Page(noted._repr_html_()).text and "three" in Page(noted._repr_html_()).text


@pytest.mark.parametrize("preset", ("lossless", "a-vl"))
def test_layers_of_other_widths_count_as_they_are(preset):
    model = windowed("wide sliding")
    apack_compile.optimize(model, preset=preset, min_tokens=0, compile="none")
    cache = apack_compile.new_cache(model)
    with torch.no_grad():
        model(input_ids=torch.randint(5, 60, (1, 60)), past_key_values=cache)
    held = [
        2 * layer.num_heads * (layer.first.key.shape[3] + layer.first.value.shape[3]) for layer in cache.packed_layers
    ]
    planned = apack_compile.report(model).layer_bytes
    assert [layer.dense for layer in planned] == held and len(set(held)) == 2
    assert [layer.packed for layer in planned] == [(2 if preset == "lossless" else 1) * width for width in held]


def test_the_bytes_of_a_token_are_those_that_a_longer_prompt_adds():
    model = optimized(ratio=3)
    held = []
    for tokens in (400, 500):
        cache = apack_compile.new_cache(model)
        with torch.no_grad():
            model(input_ids=torch.randint(4, 40, (1, tokens)), past_key_values=cache)
        held.append(cache.report()["parts"]["packed tokens and free slots"])
        slots = [layer.text_slots for layer in cache.packed_layers]
    planned = sum(layer.packed for layer in apack_compile.report(model).layer_bytes)
    assert held[1] == pytest.approx(slots[0] * planned)


def test_what_a_model_says_of_itself_is_text_and_no_markup(tmp_path):
    path = tmp_path / "<b>plan & more.safetensors"
    model = optimized(preset="lossless")
    apack_compile.plan_for(model, 100).save(path)
    apack_compile.optimize(model, plan=apack_compile.Plan.load(path))
    page = Page(apack_compile.report(model)._repr_html_())
    assert page.open == [] and "<b>plan & more.safetensors" in page.text


@pytest.mark.parametrize("build", [tiny_llama.llama, tiny_llama.gemma3, tiny_llama.lfm2])
def test_a_model_without_a_cache_so_far_has_a_page_too(build):
    model = apack_compile.optimize(build(), ratio=3, compile="none")
    report = apack_compile.report(model)
    page = Page(report._repr_html_())
    assert page.open == [] and "No cache was packed so far" in page.text
    assert report.room is None and report.layer_bytes == ()
    report.plot()


def test_layers_with_a_window_and_layers_that_are_not_packed_have_rows():
    for build in (tiny_llama.gemma3, tiny_llama.lfm2):
        model = optimized(build, ratio=3)
        model.generate(input_ids=torch.randint(4, 40, (1, 120)), max_new_tokens=2, do_sample=False, eos_token_id=None)
        report = apack_compile.report(model)
        rows = [tag for tag, _ in Page(report._repr_html_()).elements].count("tr")
        assert rows >= len(report.layers)
        assert {line.layer for line in report.layers if line.status == "packed"} == {
            layer.layer for layer in report.layer_bytes
        }


def test_only_a_page_is_saved(report, tmp_path):
    with pytest.raises(ValueError, match=r"path='.*report.json' must end in .html"):
        report.save(str(tmp_path / "report.json"))


def test_in_a_list_it_is_one_line(report):
    assert repr(report).startswith("<apack-compile report, ratio=3: 3 of 3 layers packed, 404 tokens in ")
    assert "\n" not in repr(report) and "x)" in repr(report)


def test_room_is_what_is_left_beside_the_weights(report):
    room, held = report.room, report.bytes
    assert room.memory == memory_bytes(torch.device("cpu")) > 2**30
    left = room.memory - report.weight_bytes
    assert room.dense == left // held["dense_bytes"]
    assert room.packed * held["sequence_bytes"] + held["model_bytes"] <= left
    assert (room.packed + 1) * held["sequence_bytes"] + held["model_bytes"] > left
    assert f"{room.packed:,} packed, {room.dense:,} dense" in str(report)


def test_memory_of_a_device_that_nothing_is_known_of():
    assert memory_bytes(torch.device("meta")) is None


def test_the_figure_has_a_bar_for_every_layer(report):
    pytest.importorskip("matplotlib")
    cache, layers = report.plot().axes
    assert len(cache.patches) == 3
    assert [bar.get_height() for bar in layers.patches] == [
        *(layer.dense for layer in report.layer_bytes),
        *(layer.packed for layer in report.layer_bytes),
    ]


def test_a_missing_matplotlib_is_named(report, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"apack-compile\[plot\]"):
        report.plot()
