"""Weights for antialiased bicubic resizing of 8-bit pixels in integer arithmetic, along one axis.

They are those of PyTorch's CPU kernel for uint8 (``upsample_avx_bilinear_bicubic_uint8``, after Pillow-SIMD's
``Resample.c``), which Transformers reaches through torchvision, so the result has the same bytes on any device. Cubic
convolution with a = -0.5, support scaled with the image; weights are normalised in double precision, then rounded to
16 bits at the highest precision that the largest allows. Rows first, then columns, each summed in 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_A = -0.5
_MAX_PRECISION = 22  # 32 bits, less 8 of a pixel and 2 for what the sum may exceed it by


@dataclass(frozen=True, eq=False)
class BicubicTable:
    """Output pixel i is ``(half + sum_k weights[k, i] * source[first[i] + k]) >> precision``, cut to 0..255.

    Attributes:
        first: ``[out]`` int32; ``first + k`` may exceed the source where the weight is 0.
        weights: ``[taps, out]`` int32 of 16 bits.
        precision: fractional bits.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.int32]
    precision: int

    @property
    def half(self) -> int:
        """Rounds the shift to the nearest."""
        return (1 << self.precision) >> 1

    @property
    def taps(self) -> int:
        return len(self.weights)


@lru_cache(maxsize=256)
def bicubic_table(source: int, out: int) -> BicubicTable:
    """Weights that resize ``source`` pixels to ``out``; for equal sizes a single weight of 1."""
    if source == out:
        return BicubicTable(np.arange(out, dtype=np.int32), np.ones((1, out), np.int32), 0)
    scale = source / out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    center = scale * (np.arange(out) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    sizes = np.minimum((center + support + 0.5).astype(np.int64), source) - first
    taps = np.arange(sizes.max())[:, None]
    weights = np.where(taps < sizes, _cubic((taps + first - center + 0.5) * (1.0 / stretch)), 0.0)
    weights /= np.cumsum(weights, axis=0)[-1]  # summed in order, as the kernel does
    largest = weights.max()
    precision = 0
    while precision < _MAX_PRECISION and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    scaled = weights * (1 << precision)
    rounded = np.trunc(scaled + np.copysign(0.5, scaled))
    return BicubicTable(first.astype(np.int32), rounded.astype(np.int32), precision)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel (1981)."""
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
