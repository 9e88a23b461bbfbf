"""What a worker runs: something that can be called again and again, and what each call took."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..floors.rates import synchronize
from ..workers import forget_peak, peak_bytes
from .shapes import Case

Sample = dict[str, list[float]]
"""Seconds of one iteration by what they are, most of them one value: see :data:`FIGURES`."""

FIGURES = {
    "latency": "latency",
    "time_to_first_token": "time to first token",
    "time_between_tokens": "time between tokens",
    "prefill": "prefill of a prompt",
    "enqueue": "enqueue",
    "h2d": "H2D",
    "compute": "GPU compute",
    "d2h": "D2H",
}
"""What a sample may hold, in order, and its name in a report; the last four are of a GPU alone."""


@dataclass(frozen=True)
class Turn:
    """Several iterations in a row.

    Attributes:
        seconds: from the start of the first to the end of the last.
        samples: one an iteration.
        stages: seconds of each stage of the pipeline, their sum being ``seconds``.
    """

    seconds: float
    samples: list[Sample]
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Bytes: peak of the whole process on the host; on the device, None on a CPU.

    The device's are those by which its free memory fell while the engine was loaded and the case ran first: weights,
    workspaces and caches, not the context.
    """

    host: int
    device: int | None


class Subject(ABC):
    """Runs one stage's cases, one after the other.

    Attributes:
        name: in reports.
        how: the way in which it runs the case, where there is a choice.
    """

    name: str
    how: str = ""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_device = 0

    def prepare(self, case: Case, how: str = "") -> tuple[str, str]:
        """Load what the case needs, and run it once.

        Args:
            case: what to run.
            how: the way, where there is a choice; by default the fastest.

        Returns:
            ``name`` and ``how``.
        """
        forget_peak()
        self.how = how
        with self._counting():
            self.load(case)
            self.iterate(1)
        return self.name, self.how

    def run(self, count: int) -> Turn:
        """A turn of ``count`` iterations (of as many in every stream)."""
        synchronize(self.device)
        began = time.perf_counter()
        samples = self.iterate(count)
        synchronize(self.device)
        return Turn(time.perf_counter() - began, samples)

    def memory(self) -> Memory:
        """Of the case that was prepared last."""
        return Memory(peak_bytes(), self._on_device if self.device.type == "cuda" else None)

    def output(self) -> torch.Tensor:
        """Of the last item of the case that is loaded, ``[n, C]``, to compare; not every subject has one."""
        raise NotImplementedError

    @abstractmethod
    def load(self, case: Case) -> None:
        """Make ready for a case."""

    @abstractmethod
    def iterate(self, count: int) -> list[Sample]:
        """Run the case ``count`` times."""

    @contextmanager
    def _counting(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.mem_get_info(self.device)[0]
        yield
        synchronize(self.device)
        self._on_device += before - torch.cuda.mem_get_info(self.device)[0]


def timed(
    device: torch.device,
    upload: Callable[[], Any],
    compute: Callable[[Any], Any],
    download: Callable[[Any], Any],
) -> tuple[Any, Sample]:
    """Run one inference and wait for it.

    On a GPU the phases are trtexec's, from events on the current stream: H2D, GPU compute, D2H and latency, their sum;
    enqueue is the host's time in ``compute``. Unlike trtexec's default, no transfer overlaps another inference's
    compute in the same stream.

    Returns:
        What ``download`` returned, and the sample.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        result = download(compute(upload()))
        return result, {"latency": [time.perf_counter() - began]}
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    events[0].record()
    inputs = upload()
    events[1].record()
    began = time.perf_counter()
    outputs = compute(inputs)
    enqueued = time.perf_counter() - began
    events[2].record()
    result = download(outputs)
    events[3].record()
    events[3].synchronize()
    h2d, compute_time, d2h = (first.elapsed_time(second) / 1e3 for first, second in pairwise(events))
    return result, {
        "latency": [h2d + compute_time + d2h],
        "enqueue": [enqueued],
        "h2d": [h2d],
        "compute": [compute_time],
        "d2h": [d2h],
    }
