"""What runs in a worker: a system, ours or Transformers', with one workload at a time, which repeats a case."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .cases import Case
from .roofline import synchronize
from .workers import peak_bytes, reset_peak

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
    """Peaks in bytes.

    Attributes:
        host: of the whole process.
        device: by which the GPU's free memory fell until the case had run once: weights, workspaces and caches, not the
            context; None on a CPU.
        before: the same as ``device``, or as ``host`` on a CPU, before the case was loaded.
    """

    host: int
    device: int | None
    before: int


class Workload(ABC):
    """Repeats one case; ``how`` names the way in which it does, where there is a choice."""

    how: str = ""
    device: torch.device

    @abstractmethod
    def load(self, case: Case) -> None:
        """Make ready for a case."""

    def sample(self) -> Sample:
        """Run the case once."""
        raise NotImplementedError

    def iterate(self, count: int) -> list[Sample]:
        """Run the case ``count`` times (in every stream)."""
        return [self.sample() for _ in range(count)]

    def run(self, count: int) -> Turn:
        """A turn of ``count`` iterations."""
        synchronize(self.device)
        began = time.perf_counter()
        samples = self.iterate(count)
        synchronize(self.device)
        return Turn(time.perf_counter() - began, samples)

    def output(self) -> torch.Tensor:
        """``[n, C]`` of the case's last item, to compare; not every workload has one."""
        raise NotImplementedError


class System(ABC):
    """Runs any case, one after the other.

    Attributes:
        name: in reports.
    """

    name: str

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.workload: Any = None
        self._free = self._free_memory()

    @abstractmethod
    def make(self, stage: str) -> Workload:
        """The workload of a stage's cases."""

    def prepare(self, case: Case, how: str = "") -> tuple[str, str]:
        """Load what a case needs, and run it once.

        Args:
            how: the way, where there is a choice; by default the fastest.

        Returns:
            ``name`` and ``how``.
        """
        self.workload = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        reset_peak()
        self._before = self._used()
        self.workload = self.make(case.stage)
        self.workload.how = how
        self.workload.load(case)
        self.workload.iterate(1)
        self._after = self._used()
        return self.name, self.workload.how

    def run(self, count: int) -> Turn:
        return self.workload.run(count)

    def memory(self) -> Memory:
        """Of the case that was prepared last."""
        return Memory(peak_bytes(), None if self.device.type == "cpu" else self._after, self._before)

    def output(self) -> np.ndarray:
        """In FP32; an array, since a tensor would stay in memory that the process shares."""
        return self.workload.output().float().cpu().numpy()

    def _free_memory(self) -> int:
        synchronize(self.device)
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def _used(self) -> int:
        return self._free - self._free_memory() if self.device.type == "cuda" else peak_bytes()


def timed(
    device: torch.device,
    upload: Callable[[], Any],
    compute: Callable[[Any], Any],
    download: Callable[[Any], Any],
) -> tuple[Any, Sample]:
    """Run one inference and wait for it; returns what ``download`` returned, and the sample.

    On a GPU the phases are trtexec's, from events on the current stream: H2D, GPU compute, D2H and latency, their sum;
    enqueue is the host's time in ``compute``. Unlike trtexec's default, no transfer overlaps another inference's
    compute in the same stream.
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
