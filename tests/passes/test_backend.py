"""The backend as torch.compile calls it."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import NEGATIVES, Case, repeat_kv, update
from torch import nn

from apack_compile.backend.backend import attentionpack, make_backend
from apack_compile.errors import StrictError
from apack_compile.passes import GraphRecord


class Attention(nn.Module):
    """One decode step over a packed cache, with weights around it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, query, key, value, state, mask):
        keys, values = update(key, value, state)
        out = F.scaled_dot_product_attention(self.proj(query), repeat_kv(keys, 2), repeat_kv(values, 2), mask)
        return self.proj(out)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, *inputs):
        return self.attention(*inputs)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@torch.no_grad()
def compiled(fn, backend, inputs, **kwargs):
    return torch.compile(fn, backend=backend, fullgraph=True, **kwargs)(*inputs)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_each_inner_compiler_gives_the_eager_result_and_the_same_cache(inner):
    torch.manual_seed(0)
    model, records = Model(), []
    expected_inputs, inputs = Case().inputs(), Case().inputs()
    with torch.no_grad():
        expected = model(*expected_inputs)
    out = compiled(model, make_backend(records.append, inner=inner, strict=True), inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        list(inputs[3].codes + inputs[3].dense), list(expected_inputs[3].codes + expected_inputs[3].dense)
    )
    torch.testing.assert_close(inputs[3].cursor, expected_inputs[3].cursor)
    (record,) = records
    assert [(site.layer, site.reason) for site in record.sites] == [("attention", None)]
    assert record.passes[0].count == 1
    json.dumps(record.to_dict())


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_a_graph_with_nothing_to_do_reaches_the_inner_compiler_unchanged(inner):
    def dense(x):
        x.cos()
        return F.scaled_dot_product_attention(x, x, x)

    records: list[GraphRecord] = []
    x = torch.randn(1, 2, 3, 4)
    out = compiled(dense, make_backend(records.append, inner=inner, strict=True), (x,))
    torch._dynamo.reset()
    torch.testing.assert_close(out, compiled(dense, inner, (x,)), rtol=0, atol=0)
    assert not any(p.count for p in records[0].passes)
    assert records[0].sites[0].reason == "dense: key does not come from a packed cache"


def test_torch_compile_finds_it_by_name_in_a_fresh_process():
    code = """
import sys, torch
assert "apack_compile" not in sys.modules
step = torch.compile(lambda x: x * 2 + 1, backend="attentionpack", options={"inner": "eager"})
assert step(torch.ones(2)).tolist() == [3.0, 3.0]
assert "apack_compile.backend.backend" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_it_loads_no_optional_backend():
    code = """
import sys, torch
before = set(sys.modules)
import apack_compile.backend.backend
heavy = ("triton", "torchao", "matplotlib", "transformers", "torch._inductor")
assert not [m for m in set(sys.modules) - before if m.startswith(heavy)]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_strict_names_the_layers_that_still_unpack():
    class Refused(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Inner()

        def forward(self, *inputs):
            return self.attention(*inputs)

    class Inner(nn.Module):
        def forward(self, *inputs):
            return NEGATIVES["tiled"][0](*inputs)

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(Refused(), make_backend(inner="eager", strict=True), Case().inputs())
    assert isinstance(caught.value.inner_exception, StrictError)
    assert "attention: key: repeat between" in str(caught.value)


def test_without_strict_a_refused_attention_runs_as_written():
    function = NEGATIVES["softcap"][0]
    out = compiled(function, make_backend(inner="eager"), Case().inputs())
    torch.testing.assert_close(out, function(*Case().inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iner": "eager"}, r"unknown option iner='eager': expected one of inner, strict, dump_dir"),
        ({"inner": "tvm"}, r"option inner='tvm': expected one of auto, inductor, aot_eager, eager"),
        ({"strict": "yes"}, r"option strict='yes': expected one of True, False"),
        ({"dump_dir": 3}, r"option dump_dir=3: expected a path"),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        make_backend(**options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        torch.compile(lambda x: x + 1, backend=attentionpack, options=options)(torch.ones(1))


def test_mode_goes_to_inductor_and_is_an_error_elsewhere():
    def call(**kwargs):
        return torch.compile(lambda x: x + 1, backend=attentionpack, **kwargs)(torch.ones(1))

    assert call(mode="max-autotune-no-cudagraphs").tolist() == [2.0]
    torch._dynamo.reset()
    failed = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(failed, match="mode='fastest': expected one of default"):
        call(mode="fastest")
    torch._dynamo.reset()
    with pytest.raises(failed, match="mode='reduce-overhead' belongs to inner='inductor'"):
        torch.compile(lambda x: x + 1, backend=make_backend(inner="eager"), mode="reduce-overhead")(torch.ones(1))


def test_a_made_backend_survives_a_deep_copy_as_itself():
    backend = make_backend(inner="eager")
    assert copy.deepcopy({"backend": backend})["backend"] is backend


def test_dump_dir_gets_one_folder_per_graph(tmp_path):
    backend = make_backend(inner="eager", dump_dir=str(tmp_path / "dumps"))
    for rows in (1, 2):
        compiled(Model(), backend, Case(rows=rows).inputs(), dynamic=False)
    folders = sorted(folder.name for folder in (tmp_path / "dumps").iterdir())
    assert folders == ["graph_000", "graph_001"]
    record = json.loads((tmp_path / "dumps" / "graph_001" / "record.json").read_text())
    assert record["passes"][0]["matches"][0]["details"]["query"] == ["2", "4", "2", "8"]


def test_inductor_global_passes_stay_untouched():
    from torch._inductor import config

    def custom_passes():
        return {name: value for name, value in config.get_config_copy().items() if "custom" in name and "pass" in name}

    before = custom_passes()
    assert before
    compiled(Model(), attentionpack, Case().inputs())
    assert custom_passes() == before


def test_a_step_compiled_once_serves_the_following_steps():
    torch.manual_seed(0)
    model, records = Model(), []
    step = torch.compile(model, backend=make_backend(records.append, inner="eager"), fullgraph=True)
    case = Case()
    ours, theirs = case.inputs(), case.inputs()
    for _ in range(4):
        mask = torch.arange(ours[4].shape[-1]) <= ours[3].cursor[0]
        with torch.no_grad():
            out = step(*ours[:4], mask[None, None, None])
            expected = model(*theirs[:4], mask[None, None, None])
        torch.testing.assert_close(out, expected)
    assert len(records) == 1
