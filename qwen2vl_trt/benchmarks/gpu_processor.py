"""Our preprocessor on a GPU against Transformers' there: what ``qwen2vl_trt.benchmarks.processor`` adds where there is
one.

Each gets 64 uint8 images, from the GPU's memory or the host's, and is timed until the GPU is done. The floor is the
bytes that must move (8 bits in, patches out; from the host, 8 bits over the bus) at the rates that plain copies reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from qwen2vl_trt.benchmarks.floors.rates import best_seconds, copy_rate, synchronize
from qwen2vl_trt.benchmarks.measure import Call, Contender, Sheet
from qwen2vl_trt.benchmarks.subjects.processors import Process, Size, batches, ours, transformers
from qwen2vl_trt.runtime.preprocessing.triton_writer import triton_is_installed

IMAGES = 64
_COPIED = 1 << 28  # bytes


def pictures(sizes: Sequence[Size], device: str) -> list[Tensor]:
    """Noise; no contender's time depends on the values."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8).to(device) for size in sizes]


def timed(make: Callable[[], Process], sizes: Sequence[Size], source: str, device: str) -> Call:
    process, images = make(), pictures(sizes, source)

    def call() -> float:
        synchronize(torch.device(device))
        start = time.perf_counter()
        process(images)
        synchronize(torch.device(device))
        return time.perf_counter() - start

    return call


def floor(sizes: Sequence[Size], patch_bytes: int, source: str, device: str) -> float:
    """Seconds that the batch's bytes take at the rates of plain copies."""
    read = sum(3 * height * width for height, width in sizes)
    seconds = (read + patch_bytes) / copy_rate(_COPIED, torch.device(device))
    return seconds + (read / _bus_rate(torch.device(device)) if source == "cpu" else 0.0)


def compare(sheet: Sheet, device: str = "cuda") -> None:
    """Time and print every case."""
    rows: dict[str, Callable[[], Process]] = {
        "Transformers, torchvision, FP32": partial(transformers, "torchvision", device)
    }
    for kernels in ("triton", "torch") if triton_is_installed() else ("torch",):
        for name, dtype in (("FP32", torch.float32), ("BF16", torch.bfloat16)):
            rows[f"qwen2vl-trt, {kernels}, {name}"] = partial(ours, device, dtype, kernels)
    for case, sizes in batches(IMAGES).items():
        patch_bytes = ours(device, torch.bfloat16, "torch")(pictures(sizes, device)).nbytes
        for source, place in ((device, "on the GPU"), ("cpu", "on the host")):
            contenders = [Contender(name, partial(timed, make, sizes, source, device)) for name, make in rows.items()]
            sheet.compare(f"{case}, {place}", contenders, "us/image", lambda seconds: seconds * 1e6 / IMAGES)
            seconds = floor(sizes, patch_bytes, source, device)
            print(f"  {'floor of bytes moved, BF16':<42}{seconds * 1e6 / IMAGES:>12.2f}")


def _bus_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=device.type != "cpu")
    copy = partial(torch.empty_like(source, device=device).copy_, source, non_blocking=True)
    return _COPIED / best_seconds(copy, device)
