"""Which heads of a layer a process has under tensor parallelism."""

import re

from torch import nn

from apack_compile.models.parts import decoder_of
from apack_compile.plan.ranks import ranks_of

# What gives a layer's keys, alone or with others, and the styles of tensor parallelism that leave a rank its own heads of them.
KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
CUT = ("colwise", "packed_colwise")


def heads_here(model: nn.Module, layer: int, heads: int) -> int:
    """How many of a layer's heads, KV or query heads, this rank has; raises ValueError where the ranks cannot have whole ones."""
    count = ranks_of(model).count
    if count == 1 or not cuts_heads(model, layer):
        return heads
    if heads % count:
        raise ValueError(
            f"model: {count} ranks cannot share the {heads} heads of layer {layer}: transformers cuts through a head, and the model "
            f"fails without this package too; start a number of processes that divides {heads}"
        )
    return heads // count


def cuts_heads(model: nn.Module, layer: int) -> bool:
    """Whether the ranks share a layer's heads: the plan may leave its attention whole, or gather what the projections give."""
    plan, inside = getattr(model, "tp_plan", None) or {}, set(decoder_of(model).modules())
    for name, module in model.named_modules():
        parts = name.split(".")
        # not those of a vision tower
        if parts[-1] in KEY_PROJECTIONS and str(layer) in parts and module in inside:
            return plan.get(re.sub(r"\d+", "*", name), plan.get(name)) in CUT
    return False
