"""Pixels from the host to a device: pinned buffers, reused, copied beside the work of the stream that needs them.

A slot is a pinned buffer and its twin on the device. Threads copy pixels into the first; from there they go piece by
piece, on a stream of its own. The stream that is current waits for them, the host does not. With two slots the next
batch can be brought while kernels read the one before. Off CUDA a buffer is its own twin, which is what tests use.

Not run on a GPU yet; tests/gpu/test_preprocessor.py will.
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
"""Bytes sent at a time: the first are on their way while threads still copy the others into the buffer."""
_MAX_THREADS = 8


class Staging:
    """Two slots, taken in turn.

    Args:
        device: where the pixels go.
        limit: bytes that each slot keeps between batches, on the host and again on the device. A frame larger than
            that is still brought; its buffers are let go afterwards.
    """

    def __init__(self, device: torch.device, limit: int = DEFAULT_LIMIT) -> None:
        self.device, self.limit = device, limit
        self._slots = [Slot(self), Slot(self)]

    @contextmanager
    def slot(self, size: int) -> Iterator[Slot]:
        """A slot for ``size`` bytes (:func:`bytes_of`); kernels queued within the context may read what it sends.

        The host waits here only if the copies that the slot last made, two batches ago, have not ended.
        """
        slot = self._slots.pop(0)
        self._slots.append(slot)
        slot.take(size)
        try:
            yield slot
        finally:
            slot.give_back()

    @cached_property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream of the copies; None off CUDA."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """What copies into pinned buffers."""
        return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))


class Slot:
    """A pinned buffer, its twin on the device, and how much of them is used."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._sent: torch.cuda.Event | None = None  # the last copy out of the host's buffer
        self._read: torch.cuda.Event | None = None  # the last kernel that read the device's
        self._drop()

    @property
    def capacity(self) -> int:
        """Bytes kept."""
        return self._host.numel()

    def take(self, size: int) -> None:
        """Make room for ``size`` bytes in buffers that nothing uses any more."""
        stream = self._staging.stream
        if self._sent is not None:
            self._sent.synchronize()
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

    def send(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Bring tensors of the host to the device; the current stream waits until they are there.

        Returns:
            Their like on the device. Strides may differ: the memory keeps its order, gaps and repetition are left out.
            A tensor that is on the device already is itself.
        """
        stream, first = self._staging.stream, self._used
        views: dict[int, Tensor] = {}  # a tensor that is given twice is sent once
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
            self._send(copies, first, stream)
        return [views[id(tensor)] for tensor in tensors]

    def give_back(self) -> None:
        """Note what reads the device's buffer: copies into it, by whoever takes the slot next, wait for that."""
        if self._staging.stream is not None:
            current = torch.cuda.current_stream(self._staging.device)
            self._read = current.record_event()
            self._device.record_stream(current)  # for when it is let go
        if self.capacity > self._staging.limit:
            self._drop()

    def _drop(self) -> None:
        self._host = self._device = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def _fill(self, tensor: Tensor, end: int) -> None:
        dense = _dense(tensor)
        # NumPy copies on the thread that calls it, PyTorch on all cores and in turn with all other work.
        target = self._host[end - dense.nbytes : end].view(tensor.dtype).view(dense.shape)
        np.copyto(target.numpy(), dense.numpy())

    def _send(self, copies: list[tuple[Tensor, int]], start: int, stream: torch.cuda.Stream) -> None:
        filled = self._staging.threads.map(lambda copy: self._fill(*copy), copies)
        last = copies[-1][1]
        for (_, end), _ in zip(copies, filled):
            if end - start >= _PIECE or end == last:
                with torch.cuda.stream(stream):
                    self._device[start:end].copy_(self._host[start:end], non_blocking=True)
                start = end
        self._sent = stream.record_event()
        torch.cuda.current_stream(self._staging.device).wait_event(self._sent)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of a slot that sending these takes at most."""
    return sum(_aligned(_dense(tensor).nbytes) for tensor in tensors if tensor.device.type == "cpu")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _dense(tensor: Tensor) -> Tensor:
    """A view whose dimensions go from the slowest to the fastest, repetition (grey as three channels) left out."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.permute(_memory_order(tensor))


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    """``memory``, filled with what :func:`_dense` gives, as a tensor of this shape."""
    order = _memory_order(tensor)
    dense = memory.view(_dense(tensor).shape)
    return dense.permute([order.index(axis) for axis in range(tensor.ndim)]).expand(tensor.shape)


def _memory_order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.ndim), key=lambda axis: -tensor.stride()[axis])
