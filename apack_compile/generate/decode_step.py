"""The decode step that `generate` runs: compiled, and told apart from every other model's and plan's.

Dynamo keeps at most `torch._dynamo.config.recompile_limit` graphs (8) for one code object, of all models together, and runs what comes
after them eagerly. So each model and each plan's shape has a code object of its own.
"""

import types
from collections.abc import Callable, Hashable
from itertools import count
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig

from apack_compile.backend.backend import make_backend
from apack_compile.cache.cache import CompactedCache
from apack_compile.errors import StrictError
from apack_compile.models.cache_argument import cache_of, named_arguments
from apack_compile.models.offload import is_offloaded
from apack_compile.models.uncompiled import is_uncompiled
from apack_compile.passes import GraphRecord
from apack_compile.plan.plan import Plan

_NUMBERS = count()


def _forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def function_of_its_own() -> Callable:
    """A copy of `_forward` with a new code object; its name keeps what Dynamo learns about sizes apart as well."""
    code = _forward.__code__.replace(co_name=f"decode_step_{next(_NUMBERS)}")
    return types.FunctionType(code, _forward.__globals__)


def shape_of(plan: Plan) -> Hashable:
    """What a graph has as constants of a plan."""
    bands = tuple(tuple(stream.bands.counts) for layer in plan.layers.values() for stream in layer.streams)
    rotation = None if plan.rotation is None else (plan.rotation.block, plan.rotation.interleaved_pairs)
    return tuple(plan.layers), bands, plan.groups, plan.tail_slots, rotation, plan.tiers


class DecodeSteps:
    """Compiled decode steps of one optimized model, and the records of their graphs."""

    def __init__(self, inner: str, strict: bool) -> None:
        self.inner = inner
        self.strict = strict
        self.graphs: list[GraphRecord] = []
        self.compiled: dict[Hashable, Callable] = {}
        # The last step's: a plan's shape takes a while to write down.
        self.last: tuple[tuple[Plan, ...], Callable] | None = None
        self.config = CompileConfig(backend=make_backend(self.graphs.append, inner=inner, strict=strict), mode=None)
        self.config._compile_all_devices = True

    def __deepcopy__(self, memo: dict) -> "DecodeSteps":
        """A copied model compiles anew."""
        return DecodeSteps(self.inner, self.strict)

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A forward pass: compiled when it is one token of each sequence over a filled cache, else eager."""
        cache = cache_of(args, kwargs)
        if not isinstance(cache, CompactedCache) or not cache.is_filled or tokens_of(model, args, kwargs) != 1:
            return model(*args, **kwargs)
        step = self._step_for(cache.groups.plans, cache.groups.is_branch)
        seen, elsewhere = cache.eager_chunks, is_uncompiled()
        out = step(model, args, kwargs)
        if cache.eager_chunks != seen and not elsewhere:
            self._say_it_was_eager(cache)
        return out

    def _step_for(self, plans: tuple[Plan, ...], is_branch: bool) -> Callable:
        last = self.last
        if last is None or len(last[0]) != len(plans) or any(a is not b for a, b in zip(last[0], plans, strict=True)):
            # a branch's plan is its own object: it never is the last one of other caches
            shape = is_branch, *map(shape_of, plans)
            if shape not in self.compiled:
                # setdefault: another thread may have been faster
                self.compiled.setdefault(shape, torch.compile(function_of_its_own(), **self.config.to_dict()))
            last = self.last = plans, self.compiled[shape]
        return last[1]

    def _say_it_was_eager(self, cache: CompactedCache) -> None:
        text = (
            "a decode step that should be compiled ran eagerly, right but slower: compiling is switched off "
            "(torch.compiler.set_stance, TORCHDYNAMO_DISABLE), or this plan needs more graphs than "
            f"torch._dynamo.config.recompile_limit={torch._dynamo.config.recompile_limit}"
        )
        if self.strict:
            raise StrictError(f"strict: {text}")
        cache.note(text)


def why_not_compiled(model: nn.Module) -> str | None:
    """Why no decode step of a model is compiled, whatever is asked for; None where steps are."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        method = quantizer.quantization_config.quant_method
        return f"transformers compiles no step of a model that {getattr(method, 'value', method)} quantized"
    if is_offloaded(model):
        return "no step is compiled of a model that accelerate offloads"
    return None


def tokens_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many tokens of each sequence a forward pass is given; None when it does not say."""
    given = named_arguments(model, args, kwargs)
    ids = given.get("input_ids")
    states = ids if ids is not None else given.get("inputs_embeds")
    return None if states is None else states.shape[1]
