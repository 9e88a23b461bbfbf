"""The roofline: what a case needs at least, over the rates that the device reached in the same run.

Operations and bytes are those of :mod:`qwen2vl_trt.planning.counts`: weights once a call, the valid part of the
key-value cache, and what is written to it; activations may stay on the chip.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.precision import Precision
from qwen2vl_trt.ops import scaled_mm
from qwen2vl_trt.planning import counts
from qwen2vl_trt.runtime.backends import onednn

from .cases import Case

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
        """For JSON, by unit."""
        units = {"copy": "bytes", "read": "bytes", "gemm": "flops", "fp8_gemm": "flops"}
        return {f"{name}_{units[name]}_per_second": value for name, value in asdict(self).items()}

    def memory(self, size: float) -> float:
        """Bytes a second of what reads ``size`` bytes, the best known.

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
class Bound:
    """The least that some work takes.

    Attributes:
        flops: operations.
        bytes: read and written.
        fp8_flops: those of ``flops`` between FP8 numbers.
        seconds: at the measured rates.
        limit: which of the two it waits for: ``memory`` or ``arithmetic``.
    """

    flops: float
    bytes: float
    fp8_flops: float
    seconds: float
    limit: str

    @classmethod
    def of(cls, rates: Rates, flops: float = 0.0, bytes: float = 0.0, fp8_flops: float = 0.0) -> Bound | None:
        """At these rates; None where one that the work needs is not known."""
        memory, arithmetic = bytes / rates.memory(bytes), (flops - fp8_flops) / rates.gemm
        if fp8_flops:
            if rates.fp8_gemm is None:
                return None
            arithmetic += fp8_flops / rates.fp8_gemm
        limit = "memory" if memory > arithmetic else "arithmetic"
        return cls(flops, bytes, fp8_flops, max(memory, arithmetic), limit)


def bounds_of(
    case: Case,
    config: Qwen2VLConfig,
    precision: Precision,
    rates: Rates,
    tokens: int = 0,
    device: str = "cuda",
) -> dict[str, Bound | None]:
    """Of a case's figures, as :data:`~qwen2vl_trt.benchmarks.workload.FIGURES` names them.

    A token is one in the middle of the answer, which is the mean: the cache grows by one a token.

    Args:
        tokens: of a request's prompt with its images, which ``pipeline`` and ``hidden states`` need; 0: not known.
        device: on a CPU, layers of 4 and 8 bits come with an ``lm_head`` of 8.
    """
    vision, text, size = config.vision, config.text, precision.decoder.itemsize
    if case.stage == "processor":  # 8 bits in, patches out
        read = sum(3 * height * width for height, width in case.sizes)
        written = case.patches * vision.qwen2_vl_dim * precision.vision.itemsize
        return {"latency": Bound.of(rates, bytes=read + written)}
    towers = [(t, counts.vision_flops(vision, h, w)) for t, h, w in case.grids]
    tower = sum(t * flops.total for t, flops in towers)
    if case.stage == "vision":
        blocks, fp8 = counts.vision_block_weights(vision), precision.fp8 and precision.fp8_vision
        read = (counts.vision_weights(vision) - blocks) * precision.vision.itemsize
        read += blocks * (1 if fp8 else precision.vision.itemsize)
        return {"latency": Bound.of(rates, tower, read, 2.0 * case.patches * blocks * fp8)}
    layers = text.num_hidden_layers * counts.layer_weights(text)
    head_bytes = 1 if precision.weight_only and device == "cpu" else size
    weights = counts.decode_weight_bytes(text, counts.LAYER_BYTES.get(precision.weights or "", size), head_bytes)
    cached = counts.kv_bytes_per_token(text, size)

    def prefill(prompt: int, batch: int = 1, before: float = 0.0, head: bool = True) -> Bound | None:
        flops = before + batch * counts.prefill_flops(text, prompt).total
        flops -= 0.0 if head else batch * 2.0 * counts.head_weights(text)
        return Bound.of(
            rates, flops, weights + 2.0 * batch * prompt * cached, 2.0 * batch * prompt * layers * precision.fp8
        )

    def step(prompt: int) -> Bound | None:
        keys = prompt + (case.generate - 2) // 2 + 1
        flops = counts.decode_flops(text, case.batch, keys).total
        moved = weights + case.batch * (keys + 1) * cached
        return Bound.of(rates, flops, moved, 2.0 * case.batch * layers * precision.fp8)

    if case.stage == "decoder":
        return {"prefill": prefill(case.prompt)} | (
            {"time_between_tokens": step(case.prompt)} if case.generate > 1 else {}
        )
    if not tokens:
        return {}
    together = prefill(tokens, case.batch, case.batch * tower, head=case.stage == "pipeline")
    if case.stage == "pipeline" and together is not None and (token := step(tokens)) is not None:
        seconds = together.seconds + (case.generate - 1) * token.seconds
        together = Bound(together.flops, together.bytes, together.fp8_flops, seconds, together.limit)
    return {"latency": together}


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
    """Of :func:`~qwen2vl_trt.ops.scaled_mm`, one scale a tensor, as :class:`qwen2vl_trt.layers.FP8Linear` has them."""
    best = 0.0
    for m, k, n in _CUDA_PRODUCTS:
        x, weight = (torch.randn(rows, k, device=device).to(torch.float8_e4m3fn) for rows in (m, n))
        scale = torch.ones((), device=device)
        product = partial(scaled_mm, x, weight, scale, scale, None, torch.bfloat16)
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
        for layout in onednn.PACKED:
            packed = onednn.PackedLinear(layer, layout)
            best = min(best, best_seconds(lambda: packed(x), device))  # noqa: B023
    return best


def best_seconds(call: Callable[[], object], device: torch.device, repetitions: int = 3) -> float:
    """Of several calls after one that does not count, each waited for."""
    call()
    best = math.inf
    for _ in range(repetitions):
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
