"""Which part of a model a process has under transformers' tensor parallelism (`tp_plan="auto"`)."""

import secrets
from dataclasses import dataclass

import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
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
    return ALONE if count == 1 or mesh is None else Ranks(mesh.get_local_rank(_dimension_of(mesh)), count)


def agreed_id(model: nn.Module) -> str | None:
    """A random name that the ranks of a model agree on: all of them must call this. None for a model of one rank."""
    if ranks_of(model).count == 1:
        return None
    mesh = model._device_mesh
    drawn = torch.tensor([secrets.randbits(62)], device=model.device)
    torch.distributed.broadcast(drawn, group=mesh.get_group(_dimension_of(mesh)), group_src=0)
    return f"{int(drawn):016x}"


def _dimension_of(mesh: DeviceMesh) -> str | None:
    """The dimension of a mesh whose ranks share a model; None where it has no other."""
    return "tp" if "tp" in (mesh.mesh_dim_names or ()) else None


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
