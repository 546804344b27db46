"""Which part of a model a process has under transformers' tensor parallelism (`tp_plan="auto"`)."""

import secrets
from dataclasses import dataclass

import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


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


def check_all_layers(model: nn.Module) -> None:
    """Raise ValueError where this process has some of a model's layers only."""
    mesh = getattr(model, "_device_mesh", None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    stages = mesh.size(names.index("pp")) if "pp" in names else 1
    if stages > 1:
        raise ValueError(
            f"model: its layers are spread over {stages} processes (pp_size={stages}), and packing needs all of them in each; share "
            f"the model by its heads instead, with tp_size={stages}"
        )


def agreed_id(model: nn.Module) -> str | None:
    """A random name that the ranks of a model agree on: all of them must call this. None for a model of one rank."""
    if ranks_of(model).count == 1:
        return None
    drawn = torch.tensor([secrets.randbits(62)], device=model.device)
    torch.distributed.broadcast(drawn, group=group_of(model), group_src=0)
    return f"{int(drawn):016x}"


def all_agree(model: nn.Module, is_so: bool) -> bool:
    """Whether something is so on all ranks of a model, which all must ask."""
    if ranks_of(model).count == 1:
        return is_so
    said = torch.tensor([int(is_so)], device=model.device)
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group_of(model))
    return bool(said)


def group_of(model: nn.Module) -> torch.distributed.ProcessGroup | None:
    """The processes that share a model; None for a model of one rank."""
    if ranks_of(model).count == 1:
        return None
    mesh = model._device_mesh
    return mesh.get_group(_dimension_of(mesh))


def _dimension_of(mesh: DeviceMesh) -> str | None:
    """The dimension of a mesh whose ranks share a model; None where it has no other."""
    return "tp" if "tp" in (mesh.mesh_dim_names or ()) else None


def rank_here(count: int) -> int | None:
    """This process's rank among `count` that share a model; None where torch.distributed does not say."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    # ranks that share a model follow one another
    return torch.distributed.get_rank() % count if torch.distributed.get_world_size() % count == 0 else None
