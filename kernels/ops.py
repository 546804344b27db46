"""Schemas, fake implementations and dispatch of the operations.

`Library.define` / `impl` rather than `custom_op`: half the cost per call, and decode makes two calls a layer.
"""

import torch
from torch import Tensor

from apack_compile.kernels import cuda
from apack_compile.kernels.append.reference import append
from apack_compile.kernels.attend.reference import attend
from apack_compile.kernels.unpack.reference import unpack

LIBRARY = torch.library.Library("apack", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
STATE = "Tensor[] dense, Tensor[] codes, Tensor[] bases, int[] bands, Tensor[] positions, Tensor cursor"
OPTIONAL_TIERS = (
    "Tensor? vision_importance=None, Tensor? text_importance=None, Tensor? tiers=None, int partial=0, float[]? ema=None"
)
TIERS = "Tensor(a!) vision_importance, Tensor(b!) text_importance, Tensor tiers, int partial, float[] ema"
ATTEND = f"Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, {STATE}, float? scale"

LIBRARY.define(
    "append(Tensor key, Tensor value, Tensor(a!)[] stores, Tensor[] bases, int[] bands, Tensor(b!) cursor) -> ()",
    tags=TAGS,
)
LIBRARY.define(
    f"unpack(Tensor key, Tensor value, {STATE}, SymInt tokens, {OPTIONAL_TIERS}) -> (Tensor, Tensor)", tags=TAGS
)
LIBRARY.define(f"attend({ATTEND}) -> Tensor", tags=TAGS)
# An operation of its own: one that writes, and is given nothing to write to, does not get through Inductor.
LIBRARY.define(f"attend_tiers({ATTEND}, {TIERS}) -> Tensor", tags=TAGS)
LIBRARY.impl("append", append, "CompositeExplicitAutograd")
LIBRARY.impl("unpack", unpack, "CompositeExplicitAutograd")
LIBRARY.impl("attend", attend, "CompositeExplicitAutograd")
LIBRARY.impl("attend_tiers", attend, "CompositeExplicitAutograd")
LIBRARY.impl("append", cuda.append, "CUDA")
LIBRARY.impl("attend", cuda.attend, "CUDA")
LIBRARY.impl("attend_tiers", cuda.attend, "CUDA")


@torch.library.register_fake("apack::append", lib=LIBRARY)
def _append_fake(key, value, stores, bases, bands, cursor) -> None:
    return None


@torch.library.register_fake("apack::unpack", lib=LIBRARY)
def _unpack_fake(key, value, dense, codes, bases, bands, positions, cursor, tokens, *tiers) -> tuple[Tensor, Tensor]:
    return (
        key.new_empty((key.shape[0], key.shape[1], tokens, key.shape[3])),
        value.new_empty((value.shape[0], value.shape[1], tokens, value.shape[3])),
    )


@torch.library.register_fake("apack::attend", lib=LIBRARY)
@torch.library.register_fake("apack::attend_tiers", lib=LIBRARY)
def _attend_fake(query, key, value, *state_and_tiers) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
