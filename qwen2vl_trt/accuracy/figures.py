"""The figures of one comparison: how far an output is from the reference's.

With d the difference and e the reference, over all values of an output:
maximum relative error is max|d| / max|e|, mean relative error is mean|d| / mean|e| (a quotient value by value would
be ruled by the values next to zero), cosine is that of the two outputs as one vector each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qwen2vl_trt.errors import EngineError


@dataclass(frozen=True)
class Figures:
    """One output of one case, or of several.

    Of several cases ``max_relative`` is the largest, ``mean_relative`` over all values, ``cosine`` the smallest;
    ``scale`` is the mean of the reference's absolute values, ``values`` how many were compared.
    """

    max_absolute: float
    mean_absolute: float
    max_relative: float
    mean_relative: float
    cosine: float
    scale: float
    values: int


def measure(found: np.ndarray, expected: np.ndarray, name: str) -> Figures:
    """Compare two arrays of one shape.

    Raises:
        EngineError: of different shapes.
    """
    if found.shape != expected.shape:
        raise EngineError(f"{name} is {list(found.shape)}, the reference has {list(expected.shape)}")
    a, b = (np.asarray(array, np.float64).ravel() for array in (found, expected))
    difference = np.abs(a - b)
    magnitude = np.abs(b)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return Figures(
        max_absolute=float(difference.max()),
        mean_absolute=float(difference.mean()),
        max_relative=_ratio(difference.max(), magnitude.max()),
        mean_relative=_ratio(difference.mean(), magnitude.mean()),
        cosine=float(a @ b) / norms if norms else float(not difference.any()),
        scale=float(magnitude.mean()),
        values=len(a),
    )


def merge(parts: Iterable[Figures]) -> Figures:
    """Join the figures of several cases; there is at least one."""
    figures = list(parts)
    total = sum(part.values for part in figures)
    mean, scale = (
        sum(getattr(part, name) * part.values for part in figures) / total for name in ("mean_absolute", "scale")
    )

    def worst(name: str) -> float:
        values = [getattr(part, name) for part in figures]
        if any(math.isnan(value) for value in values):  # which max() and min() may pass over
            return math.nan
        return min(values) if name == "cosine" else max(values)

    return Figures(
        worst("max_absolute"), mean, worst("max_relative"), _ratio(mean, scale), worst("cosine"), scale, total
    )


def _ratio(difference: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return float(difference) / float(scale)


@dataclass(frozen=True)
class Agreement:
    """Greedy tokens, each chosen after the reference's own tokens before it.

    Attributes:
        agreeing: steps at which the same token is the most likely.
        tokens: steps.
        first: the first step that differs, from 0; None where none does. A free-running answer differs from there on.
    """

    agreeing: int
    tokens: int
    first: int | None

    @classmethod
    def of(cls, found: list[int], expected: list[int]) -> Agreement:
        """Compare choice by choice."""
        same = [a == b for a, b in zip(found, expected, strict=True)]
        return cls(sum(same), len(same), same.index(False) if False in same else None)
