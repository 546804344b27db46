"""The masks of an attention as the one mask that `apack::attend` takes."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from apack_compile.passes.attention.scores import Added, MaskTerm
from apack_compile.passes.graph.nodes import value_of


def why_not_one_mask(masks: Sequence[MaskTerm], full: Sequence[object]) -> str | None:
    """Why `masks` cannot be one mask that broadcasts to `full` with all columns; None when they can.

    full: the scores' sizes, `[B, H_q, rows, T]`, or `[B, H_kv, groups, rows, T]` where query heads are grouped.
    """
    if not masks:
        return "no mask: the empty slots that unpack returns would be attended"
    values = [value_of(term.node) for term in masks]
    for term, value in zip(masks, values, strict=True):
        if not isinstance(value, torch.Tensor):
            return f"the graph does not record the shape of mask {term.node.name}"
        if isinstance(term, Added) and not value.dtype.is_floating_point:
            return f"mask is {value.dtype}, neither bool nor floating point"
        if not isinstance(term, Added) and value.dtype != torch.bool:
            return f"mask is {value.dtype}, not bool"
    rank = max(value.ndim for value in values)
    if rank != len(full):
        return f"mask has {rank} dimensions, not {len(full)}"
    for value in values:
        sizes = zip(value.shape, full[rank - value.ndim :], strict=True)
        if not all(statically_known_true(m == f) or statically_known_true(m == 1) for m, f in sizes):
            return f"mask {tuple(value.shape)} does not broadcast to {tuple(full)}"
    if not _given(values, full, -1):
        return f"mask {tuple(values[0].shape)} does not broadcast to {tuple(full)} with all columns given"
    if rank == 5 and _given(values, full, 1) != _given(values, full, 2) and full[1] != 1 and full[2] != 1:
        return "mask differs between KV heads or between the query heads of one, not both"
    return None


def _given(values: Sequence[torch.Tensor], full: Sequence[object], dim: int) -> bool:
    """Whether some mask has an entry for each index of a dimension."""
    dim = dim % len(full) - len(full)
    return any(v.ndim >= -dim and statically_known_true(v.shape[dim] == full[dim]) for v in values)


def one_mask(graph: fx.Graph, masks: Sequence[MaskTerm]) -> fx.Node:
    """Nodes at the graph's insertion point that make one mask of all: bool where that is enough, else added to the scores.

    What a finite fill hides, -inf hides too: its weight is zero either way wherever a row attends to anything.
    """
    mask: fx.Node | None = None
    is_bool = False
    for term in masks:
        if isinstance(term, Added):
            if mask is None:
                mask = term.node
            elif is_bool:
                mask = graph.call_function(torch.where, (mask, term.node, -math.inf))
            else:
                mask = graph.call_function(operator.add, (mask, term.node))
            is_bool = False
            continue
        kept = term.node if term.keeps else graph.call_function(torch.logical_not, (term.node,))
        if mask is None or is_bool:
            mask = kept if mask is None else graph.call_function(torch.logical_and, (mask, kept))
            is_bool = True
        else:
            mask = graph.call_function(torch.where, (kept, mask, -math.inf))
    assert mask is not None
    return mask
