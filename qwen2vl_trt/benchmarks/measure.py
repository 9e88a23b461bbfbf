"""Who takes which turn, and what the samples add up to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .cases import Case
from .workload import FIGURES, Memory, Sample, Turn

PERCENTILES = (90, 95, 99)
"""Those that trtexec reports by default."""
_TURN = 0.25  # seconds that one system runs before the next has its turn


@dataclass(frozen=True)
class Until:
    """When to stop: trtexec's options.

    Attributes:
        warm_up: seconds that do not count; None for none, not even one turn.
        duration: seconds at least.
        iterations: at least.
    """

    warm_up: float | None = 0.2
    duration: float = 3.0
    iterations: int = 10


def statistics_of(milliseconds: Sequence[float]) -> dict[str, float]:
    """Count, min, max, mean, median and percentiles of at least one sample."""
    ordered = sorted(milliseconds)
    return {
        "count": len(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        **{f"p{number}": percentile(ordered, number) for number in PERCENTILES},
    }


def percentile(ordered: Sequence[float], number: int) -> float:
    """A percentile of ascending samples, never interpolated: trtexec's ``findPercentile``.

    trtexec (TensorRT, ``samples/common/sampleReporting.cpp``) leaves out the ``(1 - number / 100) * count`` largest,
    rounded down, and takes the largest of the rest. That is numpy's ``percentile(..., method="inverted_cdf")``. Here
    the product is exact; in trtexec's 32-bit floats the 99th of 100 samples is the largest.
    """
    excluded = (100 - number) * len(ordered) // 100
    return ordered[max(len(ordered) - 1 - excluded, 0)]


@dataclass
class Measurement:
    """What one system did in one case.

    Attributes:
        name: of the system.
        how: the way it chose, or nothing.
        seconds: of all its turns.
        samples: one an iteration; one a request in the pipeline.
        turns: seconds of an iteration in each turn, by the host's clock.
        stages: seconds of each stage of the pipeline.
    """

    name: str
    how: str
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None

    def add(self, turn: Turn, iterations: int) -> None:
        self.seconds += turn.seconds
        self.turns.append(turn.seconds / iterations)
        self.samples += turn.samples
        for stage, seconds in turn.stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """In milliseconds, of every figure that has samples."""
        found = {name: [1e3 * value for sample in self.samples for value in sample.get(name, ())] for name in FIGURES}
        return {name: statistics_of(values) for name, values in found.items() if values}

    @property
    def shares(self) -> dict[str, float]:
        """Of each stage of the pipeline in its time; they add up to 1."""
        return {stage: seconds / self.seconds for stage, seconds in self.stages.items()}

    def throughput(self, case: Case) -> dict[str, float]:
        """Rates by unit: all that was done over all seconds; ``decode tokens/s`` leaves prefill out."""
        rate = len(self.samples) / self.seconds
        if case.stage in ("processor", "vision"):
            return {"queries/s": rate, "images/s": rate * len(case.grids)}
        if case.stage == "pipeline":
            return {"requests/s": rate, "tokens/s": rate * case.generate}
        found = {"queries/s": rate, "tokens/s": rate * case.batch * case.generate}
        between = self.statistics.get("time_between_tokens")
        return found | ({"decode tokens/s": 1e3 * case.batch / between["mean"]} if between else {})

    def item_seconds(self, case: Case) -> float:
        """Of an image, a sample, a request or a decoded token: the median of its turns."""
        if case.stage == "decoder":
            return self.statistics["time_between_tokens"]["mean"] / 1e3 / case.batch
        return statistics.median(self.turns) / (case.batch * max(len(case.sizes), 1))


class Callee(Protocol):
    """A :class:`~qwen2vl_trt.benchmarks.workers.Worker` of a system."""

    def call(self, method: str, *arguments: Any) -> Any: ...


def measure(case: Case, workers: Sequence[Callee], until: Until, how: str = "") -> list[Measurement]:
    """Measure systems turn and turn about, so that a busy moment hits all of them.

    All stop together, when each has both the iterations and the duration.

    Args:
        how: the way, for systems that have several; by default the fastest.
    """
    found, counts = [], []
    for worker in workers:  # one after the other: they would slow each other
        found.append(Measurement(*worker.call("prepare", case, how)))
        counts.append(_warm_up(worker, until))
    while any(len(each.samples) < until.iterations or each.seconds < until.duration for each in found):
        for worker, count, measurement in zip(workers, counts, found):
            left = until.iterations - len(measurement.samples)
            enough = left if measurement.seconds >= until.duration and left > 0 else count
            iterations = min(count, enough)
            measurement.add(worker.call("run", iterations), iterations)
    for worker, measurement in zip(workers, found):
        measurement.memory = worker.call("memory")
    return found


def _warm_up(worker: Callee, until: Until) -> int:
    """Run for a while; returns the iterations of a turn: 1 where there is no warm-up."""
    if until.warm_up is None:
        return 1
    seconds = iterations = 0.0
    count = 1
    while True:
        turn: Turn = worker.call("run", count)
        seconds += turn.seconds
        iterations += count
        if seconds >= until.warm_up:
            break
        count *= 2
    turn_seconds = min(_TURN, max(until.duration, seconds / iterations))
    return max(min(int(turn_seconds * iterations / seconds), max(until.iterations, 1)), 1)
