"""Pixels from the host to a GPU, through two pinned buffers that are used alternately.

Threads copy pixels into a pinned buffer. From there they are copied piece by piece, on a stream of its own, to a buffer
on the device; the current stream waits for them, the host does not. So one batch is copied while kernels read the one
before. Without CUDA, as in tests, both buffers are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

DEFAULT_LIMIT = 1 << 28

_ALIGNMENT = 256
_PIECE = 1 << 23
"""Bytes copied at a time: the first are under way while threads still fill the buffer."""
_MAX_THREADS = 8


class Staging:
    """Two slots, used alternately.

    Args:
        device: where the pixels go.
        limit: bytes that each slot keeps between batches, on the host and on the device. A larger frame is copied too,
            and its buffers are freed afterwards.
    """

    def __init__(self, device: torch.device, limit: int = DEFAULT_LIMIT) -> None:
        self.device, self.limit = device, limit
        self._slots = [Slot(self), Slot(self)]

    @contextmanager
    def slot(self, size: int) -> Iterator[Slot]:
        """A slot for ``size`` bytes (:func:`staged_bytes`). Kernels that read it are queued within the context.

        The host waits only if the slot's copies of two batches ago have not ended.
        """
        slot = self._slots.pop(0)
        self._slots.append(slot)
        slot.acquire(size)
        try:
            yield slot
        finally:
            slot.release()

    @cached_property
    def stream(self) -> torch.cuda.Stream | None:
        """For the copies; None without CUDA."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """Fill pinned buffers."""
        return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))


class Slot:
    """A pinned buffer and a buffer on the device."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._copied: torch.cuda.Event | None = None  # after the last copy out of the host's buffer
        self._read: torch.cuda.Event | None = None  # after the last kernel that reads the device's
        self._free()

    @property
    def capacity(self) -> int:
        """Bytes of each buffer."""
        return self._host.numel()

    def acquire(self, size: int) -> None:
        """Wait until the buffers are unused, and grow them to ``size`` bytes."""
        stream = self._staging.stream
        if self._copied is not None:
            self._copied.synchronize()
        if stream is not None and self._read is not None:
            stream.wait_event(self._read)
        self._used = 0
        if size <= self.capacity:
            return
        size = max(size, min(2 * self.capacity, self._staging.limit))
        if stream is None:
            self._host = self._device = torch.empty(size, dtype=torch.uint8, device=self._staging.device)
        else:
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            with torch.cuda.stream(stream):
                self._device = torch.empty(size, dtype=torch.uint8, device=self._staging.device)

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy host tensors to the device; the current stream waits for them.

        Returns:
            Equal tensors on the device. Memory order is preserved; gaps and repetition are not. A tensor that is
            already there is returned as it is.
        """
        stream, first = self._staging.stream, self._used
        views: dict[int, Tensor] = {}  # a tensor that is given twice is copied once
        copies: list[tuple[Tensor, int]] = []  # and where in the buffers each ends
        for tensor in tensors:
            if id(tensor) in views:
                continue
            if tensor.device.type != "cpu":
                views[id(tensor)] = tensor.to(self._staging.device, non_blocking=True)
                continue
            dense = _dense(tensor)
            end = self._used + dense.nbytes
            views[id(tensor)] = _like(tensor, self._device[self._used : end].view(tensor.dtype))
            copies.append((tensor, end))
            self._used = _aligned(end)
        if stream is None:
            for tensor, end in copies:
                self._fill(tensor, end)
        elif copies:
            self._copy(copies, first, stream)
        return [views[id(tensor)] for tensor in tensors]

    def release(self) -> None:
        """Record what reads the device's buffer: the next copies into it wait for that."""
        if self._staging.stream is not None:
            current = torch.cuda.current_stream(self._staging.device)
            self._read = current.record_event()
            self._device.record_stream(current)  # for when it is freed
        if self.capacity > self._staging.limit:
            self._free()

    def _free(self) -> None:
        self._host = self._device = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def _fill(self, tensor: Tensor, end: int) -> None:
        dense = _dense(tensor)
        # NumPy copies on the calling thread, PyTorch on all cores and in turn with all other work.
        target = self._host[end - dense.nbytes : end].view(tensor.dtype).view(dense.shape)
        np.copyto(target.numpy(), dense.numpy())

    def _copy(self, copies: list[tuple[Tensor, int]], start: int, stream: torch.cuda.Stream) -> None:
        filled = self._staging.threads.map(lambda copy: self._fill(*copy), copies)
        last = copies[-1][1]
        for (_, end), _ in zip(copies, filled):
            if end - start >= _PIECE or end == last:
                with torch.cuda.stream(stream):
                    self._device[start:end].copy_(self._host[start:end], non_blocking=True)
                start = end
        self._copied = stream.record_event()
        torch.cuda.current_stream(self._staging.device).wait_event(self._copied)


def staged_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of a slot that these take at most."""
    return sum(_aligned(_dense(tensor).nbytes) for tensor in tensors if tensor.device.type == "cpu")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _dense(tensor: Tensor) -> Tensor:
    """A view with dimensions in memory order and without repetition (grey as three channels)."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.permute(_memory_order(tensor))


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    """``memory``, filled from :func:`_dense`, in the shape of ``tensor``."""
    order = _memory_order(tensor)
    dense = memory.view(_dense(tensor).shape)
    return dense.permute([order.index(axis) for axis in range(tensor.ndim)]).expand(tensor.shape)


def _memory_order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.ndim), key=lambda axis: -tensor.stride()[axis])
