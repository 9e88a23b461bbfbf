"""From host memory and files to a GPU, through pinned memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checkpoint import TensorLocation
from .errors import CheckpointError, reason

_BUFFER = 32 << 20  # bytes


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
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


class PinnedReader:
    """Reads tensors of safetensors files onto a device: one pinned buffer is filled while the other is copied.

    A memory map copied to a GPU goes page fault by page fault through the driver's own staging buffer, and reading the
    tensor first would hold it in memory twice.

    Args:
        device: a GPU; on a CPU it does the same with ordinary memory.
        buffer: bytes of each of the two buffers.
    """

    def __init__(self, device: torch.device, buffer: int = _BUFFER) -> None:
        self._device = device
        gpu = device.type == "cuda"
        self._buffers = [torch.empty(buffer, dtype=torch.uint8, pin_memory=gpu) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._buffers] if gpu else []
        self._turn = 0

    def read(self, location: TensorLocation) -> Tensor:
        """One tensor, in its own type and shape, in memory of its own.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        target = torch.empty(location.length, dtype=torch.uint8, device=self._device)
        try:
            with location.path.open("rb", buffering=0) as file:
                file.seek(location.offset)
                for begin in range(0, location.length, len(self._buffers[0])):
                    part = target[begin : begin + len(self._buffers[0])]
                    buffer = self._free_buffer()[: len(part)]
                    view = memoryview(buffer.numpy().data)
                    while view:
                        count = file.readinto(view)
                        if not count:
                            raise CheckpointError(f"{location.path} is truncated: it was longer when it was opened")
                        view = view[count:]
                    part.copy_(buffer, non_blocking=True)
                    if self._copied:
                        self._copied[self._turn].record(torch.cuda.current_stream(self._device))
        except OSError as error:
            raise CheckpointError(f"{location.path} cannot be read: {reason(error)}") from None
        return target.view(location.dtype).view(location.shape)

    def _free_buffer(self) -> Tensor:
        self._turn = 1 - self._turn
        if self._copied:
            self._copied[self._turn].synchronize()
        return self._buffers[self._turn]
