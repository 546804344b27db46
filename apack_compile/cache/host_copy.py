"""Numbers of a device, copied to the host while both go on."""

import torch
from torch import Tensor


class HostCopy:
    """Numbers on their way from a device to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrived = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers; waits until they have arrived, not for what came after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
