"""How fast the device is: what a floor divides by. Measured, in the same run as what it is compared with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qwen2vl_trt.runtime.backends import onednn

from .work import Work

_REPETITIONS = 3
_PRODUCTS = ((1024, 2048, 2048), (1024, 1280, 3840))  # rows, summed over, columns
_CUDA_PRODUCTS = ((8192, 8192, 8192), (16384, 4096, 4096))
_COLUMNS = 1024  # of the matrices read
_SIZES = tuple(1 << bits for bits in range(20, 29, 2))  # bytes, from what fits a cache to what fits none
_CUDA_SIZES = tuple(1 << bits for bits in range(22, 32, 3))


@dataclass(frozen=True)
class Rates:
    """Best of several, of one device and type.

    Attributes:
        copy: bytes a second of a copy larger than any cache, read and written bytes both counted.
        read: bytes a second of a matrix-vector product by the matrix's bytes: a small one is faster, it stays in a
            cache.
        gemm: operations a second of a matrix product, two a multiply-add.
        fp8_gemm: the same between FP8 numbers: a CPU computes on them in its own type, at its own rate. None on a GPU
            that has no such product, or where torch does not offer it.
    """

    copy: float
    read: dict[int, float]
    gemm: float
    fp8_gemm: float | None

    def __str__(self) -> str:
        read = self.read[max(self.read)]
        return (
            f"copy {self.copy / 1e9:,.1f} GB/s, matrix-vector product {read / 1e9:,.1f} GB/s, matrix product"
            f" {self.gemm / 1e9:,.0f} GFLOP/s"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": {str(size): rate for size, rate in self.read.items()},
            "gemm_flops_per_second": self.gemm,
            "fp8_gemm_flops_per_second": self.fp8_gemm,
        }

    def memory(self, size: int) -> float:
        """Bytes a second of what reads ``size`` bytes, the best known: a floor divides by what the device can do.

        A larger matrix than that counts as well: what a call costs besides the reading weighs less there.
        """
        below = max((measured for measured in self.read if measured <= size), default=min(self.read))
        return max(self.copy, *(rate for measured, rate in self.read.items() if measured >= below))

    def best(self, other: Rates) -> Rates:
        """The better of each."""
        read = {size: max(rate, other.read[size]) for size, rate in self.read.items()}
        fp8_gemm = None if self.fp8_gemm is None else max(self.fp8_gemm, other.fp8_gemm or 0.0)
        return Rates(max(self.copy, other.copy), read, max(self.gemm, other.gemm), fp8_gemm)


@dataclass(frozen=True)
class Floor:
    """Seconds that some work takes at least, and which of the two it is waiting for: ``memory`` or ``arithmetic``."""

    work: Work
    seconds: float
    bound: str

    @classmethod
    def of(cls, work: Work, rates: Rates) -> Floor | None:
        """At the measured rates; None where one that the work needs is not known."""
        memory, arithmetic = work.bytes / rates.memory(work.bytes), (work.flops - work.fp8_flops) / rates.gemm
        if work.fp8_flops:
            if rates.fp8_gemm is None:
                return None
            arithmetic += work.fp8_flops / rates.fp8_gemm
        return cls(work, max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic")


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device in the type of an engine's activations; a second or two."""
    cuda = device.type == "cuda"
    sizes = _CUDA_SIZES if cuda else _SIZES
    copy = copy_rate(sizes[-1], device)
    read = {}
    for size in sizes:
        matrix = nn.Linear(_COLUMNS, size // _COLUMNS // dtype.itemsize, bias=False, device=device, dtype=dtype)
        read[size] = size / _best_form(matrix, torch.randn(1, _COLUMNS, device=device, dtype=dtype), device)
        del matrix
    gemm = 0.0
    for m, k, n in _CUDA_PRODUCTS if cuda else _PRODUCTS:
        layer = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
        seconds = _best_form(layer, torch.randn(m, k, device=device, dtype=dtype), device)
        gemm = max(gemm, 2 * m * k * n / seconds)
    fp8_gemm = _fp8_rate(device) if cuda else gemm
    if cuda:
        torch.cuda.empty_cache()  # gigabytes that what is measured next may need
    return Rates(copy, read, gemm, fp8_gemm)


def _fp8_rate(device: torch.device) -> float | None:
    """Of ``torch._scaled_mm``, one scale a tensor, as :class:`qwen2vl_trt.layers.FP8Linear` has them."""
    best = 0.0
    for m, k, n in _CUDA_PRODUCTS:
        x, weight = (torch.randn(rows, k, device=device).to(torch.float8_e4m3fn) for rows in (m, n))
        scale = torch.ones((), device=device)
        product = partial(torch._scaled_mm, x, weight.t(), scale, scale, out_dtype=torch.bfloat16)
        try:
            best = max(best, 2 * m * k * n / best_seconds(product, device))
        except (RuntimeError, NotImplementedError):  # compute capability below 8.9
            return None
    return best


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes read and written a second by a copy of ``size`` bytes within the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)


@torch.no_grad()
def _best_form(layer: nn.Linear, x: torch.Tensor, device: torch.device) -> float:
    """Seconds of a product, plain or, on a CPU, with the weight packed by oneDNN as the torch backend keeps it."""
    best = best_seconds(lambda: layer(x), device)
    if device.type == "cpu" and onednn.available(x.dtype):
        packed = onednn.PackedLinear(layer)
        best = min(best, best_seconds(lambda: packed(x), device))
    return best


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of several calls after one that does not count, each waited for."""
    call()
    best = math.inf
    for _ in range(_REPETITIONS):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's work; a CPU's is done when its call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
