"""Schemas, fake implementations and dispatch of the operations.

`Library.define` / `impl` rather than `custom_op`: half the cost per call, and decode makes two calls a layer.
"""

import torch
from torch import Tensor

from apack_compile.kernels.append.reference import append
from apack_compile.kernels.attend.reference import attend
from apack_compile.kernels.unpack.reference import unpack

LIBRARY = torch.library.Library("apack", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
STATE = "Tensor[] dense, Tensor[] codes, Tensor[] bases, int[] bands, Tensor[] positions, Tensor cursor"

LIBRARY.define(
    "append(Tensor key, Tensor value, Tensor(a!)[] stores, Tensor[] bases, int[] bands, Tensor(b!) cursor) -> ()",
    tags=TAGS,
)
LIBRARY.define(f"unpack(Tensor key, Tensor value, {STATE}, SymInt tokens) -> (Tensor, Tensor)", tags=TAGS)
LIBRARY.define(
    f"attend(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, {STATE}, float? scale) -> Tensor",
    tags=TAGS,
)
LIBRARY.impl("append", append, "CompositeExplicitAutograd")
LIBRARY.impl("unpack", unpack, "CompositeExplicitAutograd")
LIBRARY.impl("attend", attend, "CompositeExplicitAutograd")


@torch.library.register_fake("apack::append", lib=LIBRARY)
def _append_fake(key, value, stores, bases, bands, cursor) -> None:
    return None


@torch.library.register_fake("apack::unpack", lib=LIBRARY)
def _unpack_fake(key, value, dense, codes, bases, bands, positions, cursor, tokens) -> tuple[Tensor, Tensor]:
    return (
        key.new_empty((key.shape[0], key.shape[1], tokens, key.shape[3])),
        value.new_empty((value.shape[0], value.shape[1], tokens, value.shape[3])),
    )


@torch.library.register_fake("apack::attend", lib=LIBRARY)
def _attend_fake(query, key, value, mask, bias, dense, codes, bases, bands, positions, cursor, scale) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
