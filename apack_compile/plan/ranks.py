"""Which part of a model a process has under transformers' tensor parallelism (`tp_plan="auto"`)."""

from dataclasses import dataclass

import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ranks:
    """This process's rank among those that share a model, and how many they are."""

    rank: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"


ALONE = Ranks()


def ranks_of(model: nn.Module) -> Ranks:
    """The rank that a model was loaded for."""
    count, mesh = getattr(model, "_tp_size", None) or 1, getattr(model, "_device_mesh", None)
    if count == 1 or mesh is None:
        return ALONE
    named = "tp" in (mesh.mesh_dim_names or ())
    return Ranks(mesh.get_local_rank("tp" if named else None), count)


def rank_here(count: int) -> int | None:
    """This process's rank among `count` that share a model; None where torch.distributed does not say."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    # ranks that share a model follow one another
    return torch.distributed.get_rank() % count if torch.distributed.get_world_size() % count == 0 else None


def heads_here(model: nn.Module, heads: int, head_dim: int) -> int:
    """How many of a model's KV heads this rank has."""
    count = ranks_of(model).count
    if count == 1:
        return heads
    key = next((module for name, module in model.named_modules() if name.endswith("self_attn.k_proj")), None)
    if key is None or not isinstance(getattr(key, "weight", None), nn.Parameter):
        return max(heads // count, 1)
    weight = key.weight.to_local() if isinstance(key.weight, DTensor) else key.weight
    return max(weight.shape[0] // head_dim, 1)
