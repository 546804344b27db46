"""The masks of an attention as the one mask that `apack::attend` takes."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from apack_compile.passes.nodes import value_of
from apack_compile.passes.scores import Added, MaskTerm


def why_not_one_mask(masks: Sequence[MaskTerm], full: Sequence[object]) -> str | None:
    """Why `masks` cannot be one mask that broadcasts to `full`, `[B, H_q, rows, T]`, with all columns; None when they can."""
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
    if rank != 4:
        return f"mask has {rank} dimensions, not 4"
    for value in values:
        sizes = zip(value.shape, full[4 - value.ndim :], strict=True)
        if not all(statically_known_true(m == f) or statically_known_true(m == 1) for m, f in sizes):
            return f"mask {tuple(value.shape)} does not broadcast to {tuple(full)}"
    if not any(value.ndim and statically_known_true(value.shape[-1] == full[3]) for value in values):
        return f"mask {tuple(values[0].shape)} does not broadcast to {tuple(full)} with all columns given"
    return None


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
