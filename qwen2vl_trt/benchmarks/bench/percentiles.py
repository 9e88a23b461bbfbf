"""Figures of a list of samples, as trtexec defines them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

PERCENTILES = (90, 95, 99)
"""Those that trtexec reports by default."""


@dataclass(frozen=True)
class Statistics:
    """Of samples in milliseconds; ``percentiles`` by their number."""

    count: int
    min: float
    max: float
    mean: float
    median: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Statistics:
        """Of at least one sample."""
        ordered = sorted(milliseconds)
        return cls(
            count=len(ordered),
            min=ordered[0],
            max=ordered[-1],
            mean=statistics.fmean(ordered),
            median=statistics.median(ordered),
            percentiles={number: percentile(ordered, number) for number in PERCENTILES},
        )


def percentile(ordered: Sequence[float], number: int) -> float:
    """A percentile of ascending samples, never interpolated: trtexec's ``findPercentile``.

    trtexec (TensorRT, ``samples/common/sampleReporting.cpp``) leaves out the ``(1 - number / 100) * count`` largest,
    rounded down, and takes the largest of the rest. That is numpy's ``percentile(..., method="inverted_cdf")``. Here
    the product is exact; in trtexec's 32-bit floats the 99th of 100 samples is the largest.

    Args:
        ordered: at least one sample, ascending.
        number: 0 to 100.
    """
    excluded = (100 - number) * len(ordered) // 100
    return ordered[max(len(ordered) - 1 - excluded, 0)]
