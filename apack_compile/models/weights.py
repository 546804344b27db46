"""What a model's weights weigh, and what tells them from another model's."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from apack_compile.models.wrappers import adapters_of

# Numbers of a parameter that tell it from another one.
SAMPLE = 16
# What a text configuration says of rotary embeddings, whose frequencies are no parameters.
ROPE = ("rope_parameters", "rope_theta", "rope_scaling")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are now, quantized ones as they are stored; shared ones count once.

    Buffers of linear layers count too: some libraries keep quantized weights there.
    """
    linear = [module for module in model.modules() if isinstance(getattr(module, "in_features", None), int)]
    return bytes_of([*model.parameters(), *(buffer for module in linear for buffer in module.buffers(recurse=False))])


def weights_digest(model: nn.Module) -> str:
    """A digest of what a model computes with: rotary settings, active adapters, and of all parameters names, shapes and a few numbers.

    Of quantized parameters names and shapes alone. Of what tensor parallelism shares, this process's numbers; of what FSDP shares, none.
    """
    config = model.config.get_text_config(decoder=True)
    rope = {name: getattr(config, name, None) for name in ROPE}
    settings = json.dumps([rope, adapters_of(model)], sort_keys=True, default=str)
    found, samples = hashlib.sha256(f"{settings}\n".encode()), []
    for name, x in model.named_parameters():
        found.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        if isinstance(x, DTensor) and "fsdp" not in (x.device_mesh.mesh_dim_names or ()):
            x = x.to_local()
        if not is_traceable_wrapper_subclass(x) and x.numel() and x.device.type != "meta":
            flat = x.detach().reshape(-1)
            samples.append(flat[:: max(flat.numel() // SAMPLE, 1)][:SAMPLE].float())
    # one wait for a device
    found.update(torch.cat(samples).cpu().numpy() if samples else b"")
    return found.hexdigest()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors; of those that wrap others (torchao, DTensor), of what is inside."""
    return sum(_stored(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _stored(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        # a DTensor names its mesh too
        inside = (getattr(tensor, name) for name in names)
        return sum(_stored(part) for part in inside if isinstance(part, Tensor))
    return tensor.numel() * tensor.element_size()
