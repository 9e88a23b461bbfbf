"""CUDA streams for the vision engine and for the decoder beside it; streams wait for each other, the host does not.

Off CUDA the work is done at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


class ReadyEvent:
    """The event after work on a side stream."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._device: torch.device | None = None

    @property
    def passed(self) -> bool:
        """Whether the device is past it; asking does not wait."""
        return self._event is None or self._event.query()

    def wait(self, *tensors: Tensor) -> None:
        """Let the current stream wait for it, and read the tensors: their memory is not reused before it has."""
        if self._event is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._event)
        for tensor in tensors:
            tensor.record_stream(current)

    def _mark(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device


class SideStream:
    """A stream beside the caller's.

    Args:
        device: its work's.
        stream: to queue on; None does the work where the caller stands.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = device, stream
        self._at_once = nullcontext(ReadyEvent())
        self._reading: deque[tuple[torch.cuda.Event, object]] = deque()  # what queued work reads, oldest first

    @classmethod
    def beside(cls, device: torch.device, priority: int = 0) -> SideStream:
        """One with a stream of its own on CUDA, without one elsewhere; kernels of a lower ``priority`` go first."""
        return cls(device, torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None)

    def work(self, reads: object = None) -> AbstractContextManager[ReadyEvent]:
        """Queue work: after what the caller's stream holds, beside what it gets from now on.

        Args:
            reads: the tensors that the work reads; held until it has ended.

        Returns:
            A context of the event after it, which is valid once the context is left.
        """
        return self._at_once if self._stream is None else self._queue(self._stream, reads)

    @contextmanager
    def _queue(self, stream: torch.cuda.Stream, reads: object) -> Iterator[ReadyEvent]:
        ready = ReadyEvent()
        while self._reading and self._reading[0][0].query():
            self._reading.popleft()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                yield ready
        finally:  # what was queued before an error runs all the same
            event = stream.record_event()
            self._reading.append((event, reads))
            ready._mark(event, self._device)
