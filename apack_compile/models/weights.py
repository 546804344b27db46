"""What a model's weights weigh."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are now, quantized ones as they are stored; shared ones count once.

    Buffers of linear layers count too: some libraries keep quantized weights there.
    """
    linear = [module for module in model.modules() if isinstance(getattr(module, "in_features", None), int)]
    return bytes_of([*model.parameters(), *(buffer for module in linear for buffer in module.buffers(recurse=False))])


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
