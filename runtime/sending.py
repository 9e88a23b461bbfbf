"""Small tensors from the host to a GPU, without a wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def send(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, in order with its current stream; the host does not wait.

    Args:
        values: a tensor, or what :func:`torch.as_tensor` makes one of.
        device: a GPU gets them through pinned memory, which PyTorch keeps until the copy is done.
        dtype: by default that of the values.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
