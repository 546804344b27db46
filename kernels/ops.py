"""Schemas, fake implementations and dispatch of the operations.

`Library.define` / `impl` rather than `custom_op`: half the cost per call, and decode makes two calls a layer.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from apack_compile.kernels import cuda, native
from apack_compile.kernels.append import cpu as append_cpu
from apack_compile.kernels.append.reference import append
from apack_compile.kernels.append_at.reference import append_at
from apack_compile.kernels.attend import cpu as attend_cpu
from apack_compile.kernels.attend.reference import attend
from apack_compile.kernels.autocast import without_autocast
from apack_compile.kernels.linear import cpu as linear_cpu
from apack_compile.kernels.pack.reference import pack
from apack_compile.kernels.unpack import cpu as unpack_cpu
from apack_compile.kernels.unpack.reference import unpack

LIBRARY = torch.library.Library("apack", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
STATE = "Tensor[] state, int[] layout"
TIERS = "Tensor(a!) vision_importance, Tensor(b!) text_importance, Tensor tiers, int partial, float[] ema"
OPTIONAL_TIERS = (
    "Tensor? vision_importance=None, Tensor? text_importance=None, Tensor? tiers=None, int partial=0, float[]? ema=None"
)
QUERY = "Tensor query, Tensor key, Tensor value, Tensor? mask"

# What exported programs call has defaults for state and layout: so older programs load, and their first call says what they are.
LIBRARY.define(
    "append(Tensor key, Tensor value, Tensor(a!)[] stores, Tensor[] bases, int[] layout=[]) -> ()", tags=TAGS
)
LIBRARY.define(
    "append_at(Tensor key, Tensor value, Tensor index, Tensor(a!)[] first, Tensor(b!)[] stores, Tensor[] bases, int[] layout=[]) -> ()",
    tags=TAGS,
)
LIBRARY.define(
    f"unpack(Tensor key, Tensor value, {STATE}, SymInt tokens, {OPTIONAL_TIERS}) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(f"attend({QUERY}, Tensor[]? state=None, int[] layout=[], float? scale=None) -> Tensor", tags=TAGS)
# An operation of its own: one that writes, and is given nothing to write to, does not get through Inductor.
LIBRARY.define(f"attend_tiers({QUERY}, {STATE}, float? scale, {TIERS}) -> Tensor", tags=TAGS)
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", tags=TAGS)
# Of a prompt, which no graph has: eager alone.
LIBRARY.define(
    "pack(Tensor key, Tensor value, Tensor[] bases, int[] layout, int groups, bool[] scaled, int used, int slots, int every, "
    "Tensor? real=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("pack", pack, "CompositeExplicitAutograd")
LIBRARY.impl("linear", F.linear, "CompositeExplicitAutograd")
if linear_cpu.HAS_ONEDNN:
    LIBRARY.impl("linear", linear_cpu.linear, "CPU")
LIBRARY.impl("append", append, "CompositeExplicitAutograd")
LIBRARY.impl("append_at", partial(append_at, append), "CompositeExplicitAutograd")
LIBRARY.impl("unpack", unpack, "CompositeExplicitAutograd")
LIBRARY.impl("attend", attend, "CompositeExplicitAutograd")
LIBRARY.impl("attend_tiers", attend, "CompositeExplicitAutograd")
if native.COMPILED is not None:
    LIBRARY.impl("append", append_cpu.append, "CPU")
    LIBRARY.impl("append_at", partial(append_at, append_cpu.append), "CPU")
    LIBRARY.impl("unpack", unpack_cpu.unpack, "CPU")
    LIBRARY.impl("attend", attend_cpu.attend, "CPU")
    LIBRARY.impl("attend_tiers", attend_cpu.attend, "CPU")
LIBRARY.impl("append", cuda.append, "CUDA")
LIBRARY.impl("append_at", partial(append_at, cuda.append), "CUDA")
LIBRARY.impl("pack", cuda.pack, "CUDA")
LIBRARY.impl("attend", cuda.attend, "CUDA")
LIBRARY.impl("attend_tiers", cuda.attend, "CUDA")
for name in ("append", "append_at", "unpack", "attend", "attend_tiers"):
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(name, without_autocast(getattr(torch.ops.apack, name).default), key)


def implementations(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Which implementation serves each operation on a device for a model's dtype, and why where it is the reference."""
    chosen = dict.fromkeys(("encode", "append", "unpack", "attend"), "reference")
    if device == "cpu":
        compiled = f"cpu ({native.STATUS})" if native.COMPILED is not None else f"reference (native: {native.STATUS})"
        own = "reference (float64)" if dtype == torch.float64 else compiled
        chosen = dict.fromkeys(chosen, own)
    if device == "cuda":
        own = "reference (float64)" if dtype == torch.float64 else "cuda (Triton)"
        chosen.update(encode=own, append=own, attend=own)
    return chosen


@torch.library.register_fake("apack::append", lib=LIBRARY)
@torch.library.register_fake("apack::append_at", lib=LIBRARY)
def _append_fake(*arguments, **options) -> None:
    return None


@torch.library.register_fake("apack::unpack", lib=LIBRARY)
def _unpack_fake(key, value, state, layout, tokens, *tiers, **options) -> tuple[Tensor, Tensor]:
    return (
        key.new_empty((key.shape[0], key.shape[1], tokens, key.shape[3])),
        value.new_empty((value.shape[0], value.shape[1], tokens, value.shape[3])),
    )


@torch.library.register_fake("apack::attend", lib=LIBRARY)
@torch.library.register_fake("apack::attend_tiers", lib=LIBRARY)
def _attend_fake(query, key, value, *state_and_tiers, **options) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.register_fake("apack::linear", lib=LIBRARY)
def _linear_fake(x, weight, bias=None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
