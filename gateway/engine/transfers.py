"""Copies between the host and the device that the host does not wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def send(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on the device; on the CPU it shares the array's memory."""
    return _staged(values, device).to(device, non_blocking=True)


def send_list(values: list[Any], dtype: npt.DTypeLike, device: torch.device) -> Tensor:
    """The list as a tensor of its dtype on the device."""
    return send(np.array(values, dtype=dtype), device)


def send_into(values: npt.NDArray[Any], target: Tensor) -> None:
    """Copy the array into a tensor of its shape."""
    target.copy_(_staged(values, target.device), non_blocking=True)


def _staged(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy from memory that is not pinned would make the host wait.

    Each call takes pinned memory of its own from PyTorch's cache, which hands a piece out again only when the copies
    from it are done: an array may be changed, and sent again, while an earlier copy of it is still to be made.
    """
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host


class HostCopy:
    """A tensor on its way to the host, in stream order after what makes it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor
        self._arrival: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def wait(self) -> npt.NDArray[Any]:
        """The values; blocks until the device has come this far."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._host.numpy()
